import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from sllm_node.convert.sources import download_from_hub, open_source
from sllm_node.core.errors import ConversionError
from tests.models import make_source
from tests.unit.checkpoint.raw import write_raw


def no_download(model):
    raise AssertionError(f"{model} was asked of the hub")


def open_it(source, download=no_download):
    with open_source(str(source), None, download) as opened:
        return sorted(opened.tensors), opened.in_module_layout


def refused(source, download=no_download):
    with pytest.raises(ConversionError) as caught:
        open_it(source, download)
    assert caught.value.source == str(source)
    return caught.value.problem


def test_a_folder_of_safetensors_is_opened(tmp_path):
    names, in_module_layout = open_it(make_source(tmp_path))
    assert "model.norm.weight" in names
    assert not in_module_layout


def test_files_are_closed_with_the_source(tmp_path):
    with open_source(str(make_source(tmp_path)), None, no_download) as opened:
        tensor = opened.tensors["model.norm.weight"]
    with pytest.raises(ConversionError, match="Bad file descriptor"):
        list(tensor.slices())


def test_a_hub_id_is_downloaded_and_opened(tmp_path):
    asked = []

    def download(model):
        asked.append(model)
        return make_source(tmp_path)

    names, _ = open_it("some-org/Some_Model-1.5", download)
    assert "model.norm.weight" in names
    assert asked == ["some-org/Some_Model-1.5"]


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("no such entry\nmore"),
        OfflineModeIsEnabled("offline"),
        ValueError("no repository"),
        TimeoutError("late"),
    ],
)
def test_a_hub_that_does_not_deliver_says_what_to_do(error):
    def download(model):
        raise error

    problem = refused("org/model", download)
    assert type(error).__name__ in problem
    assert "check the name and the network" in problem
    assert "local folder" in problem
    assert "\n" not in problem


def test_the_hub_is_never_asked_for_pickles(monkeypatch):
    asked = {}

    def snapshot_download(model, **options):
        asked.update(model=model, **options)
        return "/folder"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert str(download_from_hub("org/model")) == "/folder"
    assert asked["model"] == "org/model"
    assert set(asked["allow_patterns"]) == {
        "*.safetensors",
        "*.json",
        "*.model",
        "*.txt",
        "*.jinja",
    }


@pytest.mark.parametrize("source", ["/no/such/folder", "./none", "a b", "x/y/z"])
def test_what_is_no_file_and_no_hub_id_is_refused_without_asking_the_hub(source):
    assert "no such folder or file" in refused(source)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickles_are_refused_with_what_to_do(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    for source in (tmp_path, tmp_path / name):
        problem = refused(source)
        assert name in problem
        assert "from_pretrained(FOLDER).save_pretrained" in problem


def test_a_checkpoint_of_ours_is_said_to_be_one(tmp_path):
    folder = write_raw(tmp_path).path
    (folder / "config.json").write_text("{}")
    for source in (folder, folder / "shard-00000.bin"):
        problem = refused(source)
        assert f"is a checkpoint already: give its folder {tmp_path} as --store" in problem
        assert "sllm-node recode m" in problem
        assert "pickle" not in problem


def test_pickles_beside_safetensors_do_no_harm(tmp_path):
    make_source(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert open_it(tmp_path)[0]


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ([], "no safetensors and no GGUF"),
        (["a.gguf", "b.gguf"], "several GGUF files, name one: a.gguf, b.gguf"),
        (["model.safetensors"], "has no config.json"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(tmp_path, names, problem):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert problem in refused(tmp_path)


@pytest.mark.parametrize("adapter", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_a_model_is_refused_as_it_would_be_left_out(tmp_path, adapter):
    make_source(tmp_path)
    (tmp_path / adapter).write_text("{}")
    problem = refused(tmp_path)
    assert f"has a PEFT adapter ({adapter}), which would be left out" in problem
    assert "merge_and_unload()" in problem


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_without_its_model_is_said_to_be_one(tmp_path, weights):
    for name in ("adapter_config.json", weights, "config.json", "training_args.bin"):
        (tmp_path / name).write_text("{}")
    problem = refused(tmp_path)
    assert "is a PEFT adapter (adapter_config.json) without its model" in problem
    assert "merge_and_unload()" in problem


def test_parts_of_a_gguf_model_are_not_offered_as_models(tmp_path):
    parts = ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"]
    for name in parts:
        (tmp_path / name).write_bytes(b"")
    problem = refused(tmp_path)
    assert f"has its GGUF model in parts ({', '.join(parts)}); join them first" in problem
    assert f"llama-gguf-split --merge {parts[0]} WHOLE.gguf" in problem
    (tmp_path / "b.gguf").write_bytes(b"")
    assert refused(tmp_path) == "has several GGUF files, name one: b.gguf"


@pytest.mark.parametrize(
    ("name", "problem"),
    [("model.safetensors", "give the folder"), ("model.onnx", "neither a folder nor"),
     ("model.gguf", "is no GGUF file")],
)  # fmt: skip
def test_a_file_that_is_no_gguf_is_refused(tmp_path, name, problem):
    (tmp_path / name).write_bytes(b"nothing")
    assert problem in refused(tmp_path / name)
