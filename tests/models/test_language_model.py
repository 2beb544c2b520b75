import pytest
import torch

from dualpipe_ext.ep import Buffer
from dualpipe_ext.launch import run_ranks
from dualpipe_ext.models import LanguageModelStage, ModelConfig, initialize, split_layers
from dualpipe_ext.models.layers import Attention

CONFIG = ModelConfig(hidden=32, num_heads=2, expert_hidden=16, shared_hidden=32, num_layers=3)


@pytest.mark.parametrize(
    ("layers", "stages", "sizes"), [(5, 2, [3, 2]), (8, 4, [2] * 4), (3, 3, [1] * 3)]
)
def test_split_layers_covers_all_in_order(layers, stages, sizes):
    runs = split_layers(layers, stages)
    assert [len(run) for run in runs] == sizes
    assert [layer for run in runs for layer in run] == list(range(layers))


def test_fewer_layers_than_stages_is_refused():
    with pytest.raises(ValueError, match="at least one layer per stage: 4 stages, got 3 layers"):
        split_layers(3, 4)


def test_attention_is_causal():
    torch.manual_seed(0)
    attention = Attention(CONFIG)
    x = torch.randn(1, 8, 32)
    changed = x.clone()
    changed[:, 5:] += 1.0
    difference = (attention(x) - attention(changed)).abs().amax(dim=(0, 2))
    assert difference[:5].max() < 1e-6
    assert difference[5:].min() > 1e-3


def build(ranges: list[range]) -> list[LanguageModelStage]:
    buffer = Buffer(
        hidden=CONFIG.hidden, num_experts=CONFIG.num_experts, top_k=CONFIG.top_k, max_tokens=64
    )
    stages = []
    for layers in ranges:
        stage = LanguageModelStage(CONFIG, layers, buffer=buffer)
        experts = {layer: range(CONFIG.num_experts) for layer in layers}
        initialize(stage, CONFIG, seed=3, local_experts=experts)
        stages.append(stage)
    return stages


def compare_cuts() -> bool:
    """Whole model against three stages: the same parameters by name, the same logits."""
    (whole,) = build([range(3)])
    cut = build([range(1), range(1, 2), range(2, 3)])
    parameters = dict(whole.named_parameters())
    names = []
    for stage in cut:
        for name, parameter in stage.named_parameters():
            assert torch.equal(parameter, parameters[name]), name
            names.append(name)
    assert sorted(names) == sorted(parameters)
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    expected = whole(tokens)
    x = tokens
    for stage in cut:
        x = stage(x)
    assert torch.equal(x, expected)
    # Layers and experts must differ from each other, or equality above would prove little.
    first, second = (parameters[f"layers.{i}.experts.gate_up"] for i in (0, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert 0.015 < first.std().item() < 0.025
    return True


def test_cutting_the_model_changes_nothing():
    assert run_ranks(compare_cuts, 1, run_timeout_s=60) == [True]
