"""Claims about saved folders: each carries its code, and loads with every Auto class where the package is missing."""

import json

import pytest
import torch
from conftest import HEADS, TWO_DEEP, answer, assert_close, noise, run_without_package, tiny_model
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_lighthubert.export import to_hubert
from modeling_lighthubert.onnx_export import ExportedModel


FORMS = ["supernet", "cut"]
CASES = [(auto_class, form) for auto_class in HEADS for form in FORMS]

# Loads every folder with its Auto class and answers. A copy is asked: where a matrix lies in memory can change the
# last digit of a product, and a mapped file is not laid out like fresh memory
LOAD_ALL = """
import copy, json, sys
import transformers
from safetensors.torch import load_file, save_file

waveform = load_file("waveform.safetensors")["waveform"]
answers, facts = {}, {}

def answer(model):
    with torch.no_grad():
        outputs = copy.deepcopy(model)(waveform)
    if "logits" in outputs:
        return outputs.logits
    return outputs.predictions[0] if "predictions" in outputs else outputs.last_hidden_state

for folder in sys.argv[1:]:
    auto_class, form = folder.split("-")
    auto_class = getattr(transformers, auto_class)
    model, report = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    answers[folder] = answer(model)
    facts[folder] = {
        "class": type(model).__name__,
        "module": type(model).__module__.split(".")[0],
        "elastic": any("elastic" in type(module).__module__ for module in model.modules()),
        "subnet": model.subnet.to_dict(),
        "report": sorted(name for name, entries in report.items() if entries),
    }
    if form == "supernet":
        with model.using_subnet("largest"):
            answers[folder + "-largest"] = answer(model)
        cut = model.extract_subnet("smallest")
        answers[folder + "-smallest"] = answer(cut)
        cut.save_pretrained("again-" + folder)
        model.set_subnet("smallest")
        model.save_pretrained("selected-" + folder)
save_file({name: tensor.contiguous() for name, tensor in answers.items()}, "answers.safetensors")
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def models():
    """Model of every head and form, a drawn subnet selected."""
    subnet = TWO_DEEP.sample(4)
    supernets = {auto_class: tiny_model(head).cpu() for auto_class, head in HEADS.items()}
    for supernet in supernets.values():
        supernet.set_subnet(subnet)
    cuts = {(auto_class, "cut"): supernet.extract_subnet() for auto_class, supernet in supernets.items()}
    return {(auto_class, "supernet"): supernet for auto_class, supernet in supernets.items()} | cuts


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    """Where the models are saved, each in a folder `Auto class-form`, and a waveform."""
    folder = tmp_path_factory.mktemp("remote")
    save_file({"waveform": noise(1, 8000).cpu()}, folder / "waveform.safetensors")
    for (auto_class, form), model in models.items():
        model.save_pretrained(folder / f"{auto_class}-{form}")
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    """What a process without the package found in the folders: facts and answers of each."""
    facts = run_without_package(LOAD_ALL, folder, *(f"{auto_class}-{form}" for auto_class, form in CASES))
    return facts, load_file(folder / "answers.safetensors")


@pytest.mark.parametrize(("auto_class", "form"), CASES)
def test_a_folder_answers_bit_for_bit_without_the_package(models, loaded, auto_class, form):
    _, answers = loaded
    assert torch.equal(answers[f"{auto_class}-{form}"], answer(models[auto_class, form], noise(1, 8000), device="cpu"))


@pytest.mark.parametrize(("auto_class", "form"), CASES)
def test_a_folder_loads_whole_as_its_class_from_its_own_code(models, loaded, auto_class, form):
    facts = loaded[0][f"{auto_class}-{form}"]
    assert facts["class"] == type(models[auto_class, form]).__name__
    assert facts["module"] == "transformers_modules"
    assert facts["subnet"] == TWO_DEEP.sample(4).to_dict()
    assert facts["elastic"] is (form == "supernet")
    assert facts["report"] == []


@pytest.mark.parametrize("auto_class", HEADS)
def test_subnets_are_selected_and_cut_without_the_package(models, loaded, auto_class):
    model, answers = models[auto_class, "supernet"], loaded[1]
    with model.using_subnet("largest"):
        assert torch.equal(answers[f"{auto_class}-supernet-largest"], answer(model, noise(1, 8000), device="cpu"))
    cut = model.extract_subnet("smallest")
    assert torch.equal(answers[f"{auto_class}-supernet-smallest"], answer(cut, noise(1, 8000), device="cpu"))


@pytest.mark.parametrize(("auto_class", "form"), CASES)
def test_a_folder_has_its_code_and_all_auto_classes(folder, loaded, auto_class, form):
    saved = folder / f"{auto_class}-{form}"
    names = {path.name for path in saved.iterdir() if path.suffix == ".py"}
    modules = ("configuration_lighthubert", "elastic", "feature_encoder", "modeling_lighthubert", "search_space")
    modules += ("measured_subnets", "windowed_attention")
    assert names == {f"{module}.py" for module in modules}
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    assert set(config["auto_map"]) == {"AutoConfig", *HEADS}


RELOAD = """
import copy, json, sys
import transformers
from safetensors.torch import load_file

waveform = load_file("waveform.safetensors")["waveform"]
facts = {}
for folder in sys.argv[1:]:
    auto_class = folder.split("-")[1]
    with torch.no_grad():
        model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
        outputs = copy.deepcopy(model)(waveform)
    output = outputs.predictions[0] if "predictions" in outputs else outputs.to_tuple()[0]
    expected = load_file("answers.safetensors")[auto_class + "-supernet-smallest"]
    facts[folder] = {"output": output.tolist(), "expected": expected.tolist(), "subnet": model.subnet.to_dict()}
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def reloaded(folder, loaded):
    """What another such process found in the folders that the first one saved."""
    assert loaded
    names = [f"{prefix}-{auto_class}-supernet" for prefix in ("again", "selected") for auto_class in HEADS]
    return run_without_package(RELOAD, folder, *names)


@pytest.mark.parametrize("auto_class", HEADS)
def test_a_folder_saved_without_the_package_loads_without_it(reloaded, auto_class):
    cut, selected = reloaded[f"again-{auto_class}-supernet"], reloaded[f"selected-{auto_class}-supernet"]
    assert cut["subnet"] == selected["subnet"] == TWO_DEEP.smallest.to_dict()
    assert cut["output"] == cut["expected"]
    assert_close(selected["output"], selected["expected"])


CROSS = """
import json, sys
import transformers

folders, auto_classes = sys.argv[1].split(), sys.argv[2].split()
facts = {folder: {} for folder in folders}
for folder in folders:
    for auto_class in auto_classes:
        model, report = getattr(transformers, auto_class).from_pretrained(
            folder, trust_remote_code=True, output_loading_info=True
        )
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        of_encoder = ("hubert.", "encoder.", "feature_projection.")
        facts[folder][auto_class] = [name for name in report["missing_keys"] if name.startswith(of_encoder)]
print(json.dumps(facts))
"""
CROSSED = ["AutoModel-cut", "AutoModelForCTC-cut", "AutoModelForPreTraining-supernet"]


@pytest.fixture(scope="module")
def crossed(folder):
    """Encoder weights that each Auto class missed in each of these folders, in a process without the package."""
    return run_without_package(CROSS, folder, " ".join(CROSSED), " ".join(HEADS))


@pytest.mark.parametrize("auto_class", HEADS)
@pytest.mark.parametrize("name", CROSSED)
def test_every_auto_class_loads_the_encoder_of_every_folder(crossed, name, auto_class):
    assert crossed[name][auto_class] == []


REST = """
import json
from transformers import AutoConfig, AutoModel, AutoModelForCTC

facts = {}
config = AutoConfig.from_pretrained("AutoModel-supernet", trust_remote_code=True, subnet="smallest")
facts["from config"] = AutoModel.from_config(config, trust_remote_code=True).subnet.to_dict()
for folder in ("AutoModel-supernet", "AutoModelForCTC-supernet"):
    auto = AutoModel if folder.startswith("AutoModel-") else AutoModelForCTC
    facts[folder] = auto.from_pretrained(folder, trust_remote_code=True, subnet="smallest").subnet.to_dict()
for name, load in {
    "untrusted": lambda: AutoModel.from_pretrained("AutoModel-cut", trust_remote_code=False),
    "foreign": lambda: AutoModel.from_pretrained("AutoModel-supernet", trust_remote_code=True, subnet="a_small"),
    "cut": lambda: AutoModel.from_pretrained("AutoModel-cut", trust_remote_code=True).set_subnet("largest"),
}.items():
    try:
        load()
    except Exception as error:
        facts[name] = str(error)
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def rest(folder):
    return run_without_package(REST, folder)


@pytest.mark.parametrize("way", ["from config", "AutoModel-supernet", "AutoModelForCTC-supernet"])
def test_a_subnet_is_chosen_at_load_without_the_package(rest, way):
    assert rest[way] == TWO_DEEP.smallest.to_dict()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [("untrusted", "trust_remote_code=True"), ("foreign", "'a_small' is not known"), ("cut", "is a cut model")],
)
def test_mistakes_have_the_same_messages_without_the_package(rest, mistake, message):
    assert message in rest[mistake]


def test_a_model_with_the_code_of_its_folder_is_exported_by_the_package(tmp_path, waveform):
    """Its classes are others than those of the package, and have their names."""
    model = tiny_model(HEADS["AutoModelForCTC"]).extract_subnet("smallest")
    model.save_pretrained(tmp_path)
    remote_class = get_class_from_dynamic_module("modeling_lighthubert.LightHubertForCTC", tmp_path)
    remote = remote_class.from_pretrained(tmp_path).eval()
    assert not isinstance(remote, type(model))
    assert_close(answer(to_hubert(remote), waveform), answer(model, waveform))
    assert ExportedModel(remote).model is not remote  # a copy, which is folded
