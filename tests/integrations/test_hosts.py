"""What is on record of other people's trainers says what the documentation says of them."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOSTS = json.loads((ROOT / "benchmarks/results/hosts.json").read_text(encoding="utf-8"))


def test_llama_factory_trains_the_target_and_is_stopped_with_a_loss_of_its_own():
    found = HOSTS["LLaMA-Factory"]
    for steps in found["steps"].values():
        assert len(steps["own"]) == len(steps["ours"]) == 3
        for own, ours in zip(steps["own"], steps["ours"], strict=True):
            assert all(abs(ours[name] - own[name]) <= 1e-5 * abs(own[name]) for name in ("loss", "grad_norm"))
    assert found["steps"]["dft"]["own"] != found["steps"]["sft"]["own"]
    assert "did not train the loss of target dft" in found["its own loss beside a target"]
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    assert f"LLaMA-Factory {found['versions']['llamafactory']}" in page
