"""Options that are tried: each run is the same when it is resumed, and its subnets are cut as ever."""

import pytest
import torch
from conftest import answer, assert_close, noise
from scripts import distil, weights

from modeling_lighthubert import LightHubertForPreTraining


IDEAS = {
    "sandwich": (
        *("--sampling", "sandwich", "--norms_per_width", "on", "--correction_rank", 2, "--head_per_width", "on"),
        *("--head_per_depth", "on", "--in_place_weight", 0.5, "--in_place_states_weight", 0.5),
        *("--layer_weight", 0.5, "--ema_decay", 0.9, "--width_learning_rate_power", 0.5),
    ),
    "worst_up": ("--sampling", "worst_up"),
    "size_ends": ("--sampling", "size_ends", "--layer_weight", 0.5, "--target", "hidden_states"),
}


@pytest.mark.parametrize("options", IDEAS.values(), ids=IDEAS.keys())
def test_a_resumed_run_ends_as_if_nothing_had_happened(workshop, request, options):
    name = request.node.callspec.id
    steps = (*options, "--max_steps", 8, "--save_steps", 4, "--learning_rate", 2e-3, "--report_to", "none")
    whole = distil(workshop, f"whole-{name}", *steps)
    resumed = distil(workshop, f"resumed-{name}", *steps, "--resume_from_checkpoint", whole / "checkpoint-4")
    for weight_name, weight in weights(resumed).items():
        assert torch.equal(weight, weights(whole)[weight_name]), weight_name
    assert (whole / "eval_results.json").read_text() == (resumed / "eval_results.json").read_text()
    model = LightHubertForPreTraining.from_pretrained(whole).eval()
    for subnet in ("smallest", "largest"):
        model.set_subnet(subnet)
        assert_close(answer(model.extract_subnet(), noise(1, 4000)), answer(model, noise(1, 4000)))


def test_a_supernet_keeps_what_its_widths_have_for_themselves(workshop):
    """Whether or not the options are given again."""
    options = ("--max_steps", 1, "--report_to", "none")
    own = ("--norms_per_width", "on", "--correction_rank", 2)
    first = distil(workshop, "first", *options, *own)
    second = distil(workshop, "second", *options, "--student_name_or_path", first, "--learning_rate", 0.0)
    kept = [name for name in weights(first) if "_16" in name]
    assert len(kept) == 2 * (6 * 2 + 2 * 2) + 2 + 2  # six matrices and two norms of a layer; projection, encoder norm
    assert all(torch.equal(weights(second)[name], weights(first)[name]) for name in kept)
