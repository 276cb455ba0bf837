"""Checkpoints in every supported layout: through the public commands to a model that makes the same frames."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from turboserve.cli.main import main
from turboserve.errors import CheckpointError, ConfigError, UnknownModel
from turboserve.model import convert
from turboserve.model.dit import CausalVideoTransformer
from turboserve.model.interface import ChunkRequest, Control, SessionTensors, pack, state_bytes
from turboserve.model.random_weights import fill_random
from turboserve.model.registry import load_model, load_spec, resolve
from turboserve.model.wan.layout import transformer_config
from turboserve.model.wan.manifest import open_manifest
from turboserve.model.wan.tiny import PRESET, write_tiny
from turboserve.model.weights import original_state


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("checkpoints")
    return {layout: write_tiny(base / layout, layout) for layout in ("diffusers", "original", "training")}


def run(*arguments, exit_code=0):
    done = CliRunner().invoke(main, ["models", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == exit_code, done.output
    return done.stdout


def run_json(*arguments, exit_code=0):
    return json.loads(run(*arguments, "--json", exit_code=exit_code))


def first_frames(model) -> bytes:
    tensors = {one.name: torch.zeros(one.shape) for one in model.state_layout()}
    state = SessionTensors(session_id="s", seed=3, slot=0, tensors=tensors)
    model.begin(state, Control("a fox"))
    for segment in model.next_passes(state, ChunkRequest(0, 2, Control("a fox"))):
        model.advance(segment, model.forward(pack([segment])))
        if segment.completes_latents:
            return model.decode(state, 0).tobytes()
    raise AssertionError


def compose(folder, output, transformer, **more):
    flags = [part for name, value in more.items() for part in (f"--{name.replace('_', '-')}", value)]
    return run_json(
        "compose", "--transformer", transformer, "--vae", folder / "vae", "--text-encoder", folder / "text_encoder",
        "-o", output, *flags,
    )  # fmt: skip


def test_every_layout_makes_the_frames_of_the_built_in_model(folders):
    """Key maps, channel orders, statistics, tokenizer: one mistake in any and frames differ."""
    expected = first_frames(load_model("wan-tiny"))
    assert first_frames(load_model(str(folders["diffusers"]))) == expected

    (folders["original"] / "transformer" / "config.json").write_text(
        json.dumps({"num_layers": PRESET.layers, "dim": PRESET.dim, "num_heads": PRESET.heads})
    )
    assert first_frames(load_model(str(folders["original"]))) == expected

    training = folders["training"]
    made = run_json("convert", training / "self_forcing.pt", "-o", training / "sf.safetensors")
    assert made["kind"] == "transformer" and len(made["source_sha256"]) == 64
    model_toml = training / "model.toml"
    compose(training, model_toml, training / "sf.safetensors", name="mine", licence="Apache-2.0")
    assert first_frames(load_model(str(model_toml))) == expected
    spec = load_spec(str(model_toml))
    assert spec.name == "mine" and spec.model_hash == load_model(str(training)).spec.model_hash


def test_wrapped_safetensors_are_served_as_they_are(folders, tmp_path):
    """Krea saves safetensors with the wrapper's prefix: nothing to convert."""
    weights = load_file(folders["original"] / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({f"model.{key}": one for key, one in weights.items()}, tmp_path / "wrapped.safetensors")
    compose(folders["original"], tmp_path / "model.toml", tmp_path / "wrapped.safetensors")
    found = run_json("inspect", tmp_path)
    assert found["parts"]["transformer"]["layout"].startswith("original, behind")
    assert first_frames(load_model(str(tmp_path))) == first_frames(load_model("wan-tiny"))


def test_inspect_tells_parts_bytes_and_sessions(folders):
    found = run_json("inspect", folders["diffusers"], "--profile", "1.3b-h200")
    assert found["servable"] and found["preset"] == "wan-tiny" and found["notes"]
    assert found["parts"]["transformer"]["layout"] == "diffusers"
    assert found["parts"]["transformer"]["shape"] == {"layers": 2, "width": 96}
    layout = load_model(str(folders["diffusers"])).state_layout()
    in_16_bits = sum(one.nbytes // (1 if one.name in ("latents", "work") else 2) for one in layout)
    assert found["state_bytes"]["session"] == in_16_bits
    weights = (folders["diffusers"] / "transformer").glob("*.safetensors")
    stored = sum(one.numel() for path in weights for one in load_file(path).values())
    assert stored * 2 < found["sessions_per_gpu"]["weights_bytes"] < stored * 4  # in 16 bits, with the other parts
    assert found["sessions_per_gpu"]["sessions"] > 100 and found["expected"]["chunk_latency_s"] > 0
    text = run("inspect", folders["diffusers"])
    assert "sessions fit a GPU" in text and "preset wan-tiny assumed" in text


def test_inspect_says_what_a_lone_file_is(folders):
    weights = folders["original"] / "vae" / "Wan2.1_VAE.safetensors"
    assert run_json("inspect", weights)["holds"] == "VAE"
    pickled = run_json("inspect", folders["training"] / "self_forcing.pt")
    assert pickled["kind"] == "pickled checkpoint" and "models convert" in pickled["hint"]


def test_a_changed_byte_is_found_by_verify(folders, tmp_path):
    folder = write_tiny(tmp_path / "m", "original")
    compose(folder, folder / "model.toml", folder / "transformer")
    assert run_json("inspect", folder, "--verify")["verified"] is True
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    found = run_json("inspect", folder, "--verify", exit_code=1)
    assert found["verified"] is False and "transformer is not what was recorded" in found["problems"]


def test_partial_and_wrong_checkpoints_name_the_keys(folders, tmp_path):
    folder = write_tiny(tmp_path / "m", "diffusers")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["blocks.1.extra.weight"] = torch.zeros(1)
    del weights["blocks.0.attn2.to_k.weight"]
    weights["proj_out.bias"] = weights["proj_out.bias"][:3].clone()
    save_file(weights, file)
    with pytest.raises(CheckpointError) as caught:
        load_model(str(folder))
    message = str(caught.value)
    assert "1 missing: blocks.0.cross_attn.k.weight" in message
    assert "1 unexpected: blocks.1.extra.weight" in message
    assert "1 misshapen: head.head.bias [3], not [16]" in message


def test_a_missing_part_names_the_command_that_fetches_it(folders, tmp_path):
    folder = write_tiny(tmp_path / "m", "original")
    text = (
        'format = "turboserve-model-1"\npreset = "longlive-1.3b"\n'
        'transformer = "transformer"\ntext_encoder = "text_encoder"\ntokenizer = "tokenizer/tokenizer.json"\n'
    )
    (folder / "model.toml").write_text(text)
    with pytest.raises(CheckpointError, match=r"lacks its vae.*models pull Wan-AI/Wan2\.1-T2V-1\.3B-Diffusers"):
        load_spec(str(folder))
    found = run_json("inspect", folder, exit_code=1)
    assert not found["servable"] and any("models pull" in one for one in found["problems"])


def test_a_transformer_of_another_shape_is_refused(folders, tmp_path):
    (tmp_path / "model.toml").write_text(
        'format = "turboserve-model-1"\npreset = "longlive-1.3b"\n'
        + "".join(
            f'{name} = "{folders["diffusers"] / place}"\n'
            for name, place in (
                ("transformer", "transformer"), ("text_encoder", "text_encoder"), ("vae", "vae"),
                ("tokenizer", "tokenizer/tokenizer.json"),
            )
        )
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"longlive-1\.3b describes: layers 2, not 30; dim 96, not 1536"):
        load_model(str(tmp_path))


def test_both_decoders_are_offered_where_both_are_there_and_one_alone_on_request(tmp_path):
    """Told by the folder, by a model.toml that names both parts, by its list, and by the key of earlier files."""
    folder = write_tiny(tmp_path / "both", light=True)
    assert load_spec(str(folder)).decoders == ("full", "light")
    found = run_json("inspect", folder)
    assert found["servable"] and found["decoders"] == ["full", "light"]
    of_slot, by_decoder = found["state_bytes"], found["state_bytes"]["by_decoder"]
    common = sum(of_slot["fields"].values())
    assert all(one["session"] == common + one["decoder"] for one in by_decoder.values())
    assert of_slot["session"] == by_decoder["full"]["session"] > by_decoder["light"]["session"]
    assert of_slot["moved"] == by_decoder["full"]["moved"] > by_decoder["light"]["moved"]
    assert "with the light decoder" in run("inspect", folder)

    light = folder / "taew2_1.safetensors"
    compose(folder, folder / "model.toml", folder / "transformer", light_decoder=light)
    composed = open_manifest(folder)
    assert composed.decoders == ("full", "light") and "light_decoder" in composed.needed
    both = load_model(str(folder))
    assert both.spec.decoders == ("full", "light") and first_frames(both) == first_frames(load_model("wan-tiny"))
    compose(folder, folder / "model.toml", folder / "transformer", light_decoder=light, decoder="light")
    alone = open_manifest(folder)
    assert alone.decoders == ("light",) and "vae" not in alone.needed
    text = (folder / "model.toml").read_text()
    (folder / "model.toml").write_text(text.replace('decoders = ["light"]', 'decoder = "light"'))
    assert open_manifest(folder).model_hash() == alone.model_hash() != composed.model_hash()
    (folder / "model.toml").write_text(text.replace('decoders = ["light"]', 'decoders = ["light", "full"]'))
    assert open_manifest(folder).spec().decoder(None) == "light"


def test_compose_names_the_part_that_a_chosen_decoder_lacks(tmp_path):
    folder = write_tiny(tmp_path / "m")
    with pytest.raises(AssertionError, match="--decoder light without its part"):
        compose(folder, tmp_path / "model.toml", folder / "transformer", decoder="light")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("format = 3", "format 3"),
        ('format = "turboserve-model-1"', "names no preset"),
        ('format = "turboserve-model-1"\npreset = "wan-tiny"\nsink = 3', "unknown keys: sink"),
        ('format = "turboserve-model-1"\npreset = "wan-tiny"\nvae = 3', "vae is 3"),
        ('format = "turboserve-model-1"\npreset = "wan-tiny"\ndecoder = "big"', "decoder is 'big'"),
        ('format = "turboserve-model-1"\npreset = "wan-tiny"\ndecoders = ["light", "big"]', "decoders is 'big'"),
        ('format = "turboserve-model-1"\npreset = "wan-tiny"\ndecoders = "light"', "a list of full, light"),
        ('format = "turboserve-model-1"\npreset = "wan-tiny"\ndecoders = ["full", "vae"]', "names one twice"),
        ('format = "turboserve-model-1"\npreset = "wan-tiny"\ndecoder = "vae"\ndecoders = ["full"]', "both decoder"),
        ('format = "turboserve-model-1"\npreset = "wan-tiny"\nsize = "33x33"', "multiples of 16"),
        ('format = "turboserve-model-1"\npreset = "wan-tiny"\noverrides = 1', "a table"),
        ("= =", "cannot read"),
    ],
)
def test_a_model_toml_that_does_not_fit_says_so(tmp_path, text, says):
    (tmp_path / "model.toml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        open_manifest(tmp_path)


def test_paths_that_are_no_model(tmp_path, folders):
    with pytest.raises(UnknownModel, match=r"no model is called 'wan-tiiny'.*wan-tiny"):
        resolve("wan-tiiny")
    with pytest.raises(UnknownModel, match=r"there is no '.*nowhere/model\.toml'"):
        resolve(str(tmp_path / "nowhere" / "model.toml"))
    with pytest.raises(CheckpointError, match="not laid out like a model"):
        load_spec(str(tmp_path))
    with pytest.raises(CheckpointError, match="one part of a model"):
        load_spec(str(folders["training"] / "self_forcing.pt"))
    pickled = write_tiny(tmp_path / "m", "training")
    done = CliRunner().invoke(
        main,
        ["models", "compose", "--transformer", str(pickled / "self_forcing.pt"), "--vae", str(pickled / "vae"),
         "--text-encoder", str(pickled / "text_encoder"), "-o", str(pickled / "model.toml")],
    )  # fmt: skip
    assert done.exit_code == 1 and "models convert" in done.stderr and "self_forcing.pt" in done.stderr


def test_a_gateway_reads_a_checkpoint_s_spec_without_torch(folders):
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from turboserve.model import registry\n"
        f"spec = registry.load_spec({str(folders['diffusers'])!r})\n"
        f"print(spec.name, spec.width, registry.check_prompt({str(folders['diffusers'])!r}, 'a fox', 1).ignored_words)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["diffusers", "32", "()"], done.stderr


def test_the_list_of_models_tells_bytes_as_the_loaded_model_does():
    layout = load_model("wan-tiny").state_layout()
    listed = {one["name"]: one for one in run_json()["models"]}
    assert listed["wan-tiny"]["state_bytes"]["device"] == state_bytes(layout)


def test_a_lora_is_merged(tmp_path):
    torch.manual_seed(1)
    module = CausalVideoTransformer(transformer_config(PRESET))
    fill_random(module, 1)
    base = original_state(module)
    rank, alpha = 4, 8.0
    down, up = torch.randn(rank, PRESET.dim), torch.randn(PRESET.dim, rank)
    name = "blocks.1.self_attn.q"
    lora = {
        f"base_model.model.model.{name}.lora_A.default.weight": down,
        f"base_model.model.model.{name}.lora_B.default.weight": up,
    }
    torch.save({"generator": {f"model.{key}": one for key, one in base.items()}}, tmp_path / "base.pt")
    torch.save({"generator_lora": lora}, tmp_path / "lora.pt")
    made = run_json(
        "convert", tmp_path / "base.pt", "--lora", tmp_path / "lora.pt", "--lora-alpha", alpha,
        "-o", tmp_path / "out.safetensors",
    )  # fmt: skip
    assert made["lora_merged"] == 1
    merged = load_file(tmp_path / "out.safetensors")
    expected = base[f"{name}.weight"] + alpha / rank * up @ down
    assert torch.allclose(merged[f"{name}.weight"], expected, atol=1e-5)
    assert all(torch.equal(merged[key], one) for key, one in base.items() if key != f"{name}.weight")
    with pytest.raises(CheckpointError, match=r"lora_A, lora_B|does not fit"):
        convert.merge_lora(dict(base), {"base_model.model.nothing.lora_A.weight": down}, None)


def test_averaged_weights_are_taken_where_there_are_any(tmp_path):
    module = CausalVideoTransformer(transformer_config(PRESET))
    fill_random(module, 2)
    state = original_state(module)
    averaged = {key: one + 1 for key, one in state.items()}
    torch.save({"generator": state, "generator_ema": averaged}, tmp_path / "both.pt")
    for under, expected in ((None, averaged), ("generator", state)):
        flags = [] if under is None else ["--under", under]
        run("convert", tmp_path / "both.pt", "-o", tmp_path / "out.safetensors", *flags)
        got = load_file(tmp_path / "out.safetensors")
        assert all(torch.equal(got[key], one) for key, one in expected.items())


def test_an_original_text_encoder_gets_its_config(folders, tmp_path):
    state = load_file(folders["original"] / "text_encoder" / "model.safetensors")
    torch.save(state, tmp_path / "models_t5.pth")
    made = run_json("convert", tmp_path / "models_t5.pth", "-o", tmp_path / "text_encoder" / "model.safetensors")
    assert made["kind"] == "text_encoder"
    ours = json.loads((tmp_path / "text_encoder" / "config.json").read_text())
    theirs = json.loads((folders["original"] / "text_encoder" / "config.json").read_text())
    assert {key: ours[key] for key in theirs} == theirs


class Evil:
    def __reduce__(self):
        return (print, ("the unpickler ran code",))


def test_a_file_with_code_in_it_is_refused(tmp_path):
    torch.save({"generator": Evil()}, tmp_path / "evil.pt")
    done = subprocess.run(
        [sys.executable, "-m", "turboserve", "models", "convert", str(tmp_path / "evil.pt")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and "holds more than tensors" in done.stderr
    assert "the unpickler ran code" not in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04" + bytes(100)])
def test_broken_files_are_errors_not_tracebacks(tmp_path, content):
    (tmp_path / "broken.pt").write_bytes(content)
    with pytest.raises(CheckpointError):
        convert.load_tensors(tmp_path / "broken.pt")
