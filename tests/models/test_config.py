import pytest

from dualpipe_ext.models import PRESETS, ModelConfig


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"num_heads": 3}, "num_heads to divide hidden = 128, got 3"),
        ({"num_groups": 5}, "num_groups to divide num_experts = 16, got 5"),
        ({"top_groups": 9}, "top_groups of at most num_groups = 4, got 9"),
        ({"top_k": 9}, "top_k of at most 8 .*got 9"),
        ({"hidden": 0}, "positive hidden, got 0"),
        ({"hidden": 12, "num_heads": 4}, "even head width"),
        ({"fp8_experts": True}, "expert_hidden to be a multiple of 128 for fp8_experts, got 64"),
        ({"fp8_experts": True, "hidden": 64}, "hidden to be a multiple of 128"),
    ],
)
def test_impossible_sizes_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**override)


def test_overrides_keep_the_rest_of_the_preset():
    config = PRESETS["small"].with_overrides(hidden=512, num_layers=None)
    assert config.hidden == 512
    assert config.num_layers == PRESETS["small"].num_layers
