"""Expert parallelism: tokens to their experts and back, over interchangeable transports.

``Buffer`` is what models use; ``reference`` defines what it computes; ``transport`` is the contract
that NVLink, copy-engine and collective transports fulfil.
"""

from dualpipe_ext.ep.buffer import Buffer
from dualpipe_ext.ep.event import Event
from dualpipe_ext.ep.fp8 import Quantized, dequantize, quantize
from dualpipe_ext.ep.handle import ExpertMajor, Handle, Received, TokenMajor
from dualpipe_ext.ep.registry import create_transport, transport_status
from dualpipe_ext.ep.transport import (
    Capabilities,
    RouteOptions,
    Rows,
    Transport,
    TransportConfig,
)

__all__ = [
    "Buffer",
    "Capabilities",
    "Event",
    "ExpertMajor",
    "Handle",
    "Quantized",
    "Received",
    "RouteOptions",
    "Rows",
    "TokenMajor",
    "Transport",
    "TransportConfig",
    "create_transport",
    "dequantize",
    "quantize",
    "transport_status",
]
