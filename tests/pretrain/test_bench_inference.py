"""The inference benchmarks at toy scale: they print what they promise, and no time for a wrong result."""

import json

import pytest

from pretrain import bench_inference, cli
from pretrain.inference import InferenceEngine


@pytest.fixture(autouse=True)
def world(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def test_prefill(tmp_path, capsys):
    file = tmp_path / "prefill.json"
    words = ["bench", "prefill", "demo", "--device", "cpu", "--lengths", "256,1k", "--segment", "128"]
    assert cli.main([*words, "--full-until", "256", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "256:" in out and "1k:" in out and "s per million" in out
    short, long = json.loads(file.read_text())
    assert (short["length"], long["length"]) == (256, 1024) and short["full_seconds"] > 0
    assert "full_seconds" not in long and long["error"] < 1e-3
    assert long["seconds_per_million"] == pytest.approx(long["seconds"] * 1024)
    assert long["dense_attention_floor"] == pytest.approx(16 * short["dense_attention_floor"])


@pytest.mark.parametrize("memory", [[], ["--memory", "host"]])
def test_decode(tmp_path, capsys, memory):
    file = tmp_path / "decode.json"
    words = ["bench", "decode", "demo", "--device", "cpu", "--lengths", "512,4k", "--tokens", "12"]
    assert cli.main([*words, *memory, "--json", str(file)]) == 0
    assert "tokens/s" in capsys.readouterr().out
    short, long = json.loads(file.read_text())
    assert long["growth_milliseconds"] == pytest.approx(long["milliseconds"] - short["milliseconds"])
    assert long["landmark_floor_milliseconds"] > 0


@pytest.mark.parametrize("broken", ["prefill", "decode"])
def test_a_wrong_result_has_no_time(tmp_path, capsys, monkeypatch, broken):
    if broken == "decode":
        original = InferenceEngine.decode
        monkeypatch.setattr(InferenceEngine, "decode", lambda self, tokens: original(self, (tokens + 1) % 1024))
    else:
        original = InferenceEngine._upper
        monkeypatch.setattr(
            InferenceEngine, "_upper", lambda self, reading, hidden, offset: original(self, reading, hidden, offset - 8)
        )
    assert cli.main(["bench", broken, "demo", "--device", "cpu", "--lengths", "256"]) == 1
    out, err = capsys.readouterr()
    assert "256:" not in out and "the result is wrong" in err


def test_an_unknown_preset_is_named(capsys):
    assert cli.main(["bench", "decode", "9b"]) == 2
    assert "no preset '9b'" in capsys.readouterr().err


def test_the_floor_counts_what_a_token_reads():
    """By hand for a preset: every landmark of both HSA layers, one number of d_r per chunk."""
    from omegaconf import OmegaConf

    from parallel.model_config import ModelConfig
    from recipes import PRESETS_DIR

    class Stub:
        sizes = ModelConfig(**OmegaConf.load(PRESETS_DIR / "345m.yaml"))

        class engine:
            class store:
                class landmarks:
                    element_size = staticmethod(lambda: 2)

    assert bench_inference.landmark_bytes(Stub, 1 << 24) == 2 * (1 << 18) * 1024 * 2
