"""Names and behaviour of other projects on top of this one; nothing inside imports these."""
