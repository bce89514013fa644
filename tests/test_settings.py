"""Settings: overrides, sources on top of each other, their two kinds, the generated files."""

import json
import pickle
from pathlib import Path
from typing import Literal

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from scripts import config
from scripts.common import settings
from scripts.common.errors import KilnError
from scripts.common.settings import Settings, execution


class Optimiser(Settings):
    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    log_every: int = execution(10)


class Watch(Settings):
    url: str = "none"


class Section(Settings):
    name: str = "plain"
    kind: Literal["step", "cosine"] = "step"
    weights: str | None = None
    sides: tuple[str, ...] = ("train",)
    optimiser: Optimiser = Optimiser()
    second: Optimiser | None = None
    stages: tuple[Optimiser, ...] = ()
    watch: Watch = execution(Watch())
    workers: int = execution(4, ge=0)


def fails(model, values) -> KilnError:
    with pytest.raises(KilnError) as caught:
        settings.validate(model, values, "a test")
    return caught.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5e-3", 5e-4),
        ("-2.5e+3", -2500.0),
        ("64", 64),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("", None),
        ("[1,2]", [1, 2]),
        ("[train,test]", ["train", "test"]),
        ("{a: 1}", {"a": 1}),
        ("resnet18", "resnet18"),
        ("nan", "nan"),
        ("infinity", "infinity"),
        ("'1e-4'", "1e-4"),
        ("a=b", "a=b"),
        ("/data/1e-4", "/data/1e-4"),
    ],
)
def test_override_values_are_yaml_with_floats(text, value):
    parsed = settings.parse_overrides([f"a.b={text}"])["a"]["b"]
    assert (parsed, type(parsed)) == (value, type(value))


def test_overrides_nest():
    assert settings.parse_overrides("a.b.c=1  a.b.d=2\ta.e=[3,4] f=x") == {
        "a": {"b": {"c": 1, "d": 2}, "e": [3, 4]},
        "f": "x",
    }
    assert settings.parse_overrides("") == {}


@pytest.mark.parametrize(
    "text", ["a.b", "=3", "a.b= 3", "a = 3", "a=1 a.b=2", "a.b=2 a=1", "a.b=[1, 2]", "a={", "a=*x"]
)
def test_broken_overrides_are_refused_with_a_hint(text):
    with pytest.raises(KilnError) as caught:
        settings.parse_overrides(text)
    assert "override" in caught.value.message
    assert caught.value.hint


flat = st.dictionaries(st.sampled_from("abc"), st.integers(0, 9))
two_deep = st.builds(lambda a, b: {**a, **b}, flat, st.dictionaries(st.sampled_from("ABC"), flat))
nested = st.builds(lambda a, b: {**a, **b}, flat, st.dictionaries(st.sampled_from("XYZ"), two_deep))


@given(nested)
def test_overrides_reach_every_leaf(values):
    def overrides(part, prefix=""):
        for key, value in part.items():
            if isinstance(value, dict):
                yield from overrides(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}={value}"

    def without_empty(part):
        parts = {k: without_empty(v) if isinstance(v, dict) else v for k, v in part.items()}
        return {k: v for k, v in parts.items() if v != {}}

    assert settings.parse_overrides(" ".join(overrides(values))) == without_empty(values)


@given(nested, nested, nested)
def test_merge_is_associative_and_the_later_one_wins(a, b, c):
    merge = settings.merge
    assert merge(merge(a, b), c) == merge(a, merge(b, c))
    assert merge(a, {}) == a == merge({}, a)
    assert merge(a, a) == a
    for key, value in b.items():
        if not (isinstance(value, dict) and isinstance(a.get(key), dict)):
            assert merge(a, b)[key] == value


def test_merge_replaces_lists_whole_and_leaves_its_arguments_alone():
    base, over = {"a": [1, 2], "s": {"x": 1, "y": 2}}, {"a": [3], "s": {"y": 5}}
    copies = json.dumps([base, over])
    assert settings.merge(base, over) == {"a": [3], "s": {"x": 1, "y": 5}}
    assert json.dumps([base, over]) == copies


@pytest.mark.parametrize(
    ("values", "key", "allowed", "nearest"),
    [
        ({"nam": "x"}, "'nam'", "name", "'name'"),
        ({"optimiser": {"Lr": 1}}, "'optimiser.Lr'", "lr, betas, log_every", "'optimiser.lr'"),
        ({"second": {"beta": [0, 0]}}, "'second.beta'", "lr, betas, log_every", "'second.betas'"),
        ({"stages": [{}, {"lrr": 1}]}, "'stages.1.lrr'", "lr, betas, log_every", "'stages.1.lr'"),
        ({"watch": {"ulr": "x"}}, "'watch.ulr'", "url", "'watch.url'"),
    ],
)
def test_unknown_key_names_key_allowed_and_nearest(values, key, allowed, nearest):
    error = fails(Section, values)
    assert f"unknown key {key}" in error.message
    assert f"allowed here: {allowed}" in error.message
    assert f"did you mean {nearest}?" in error.hint
    assert "a test" in error.message


def test_a_name_of_the_original_project_gets_ours_as_the_hint():
    class Renamed(Section):
        original_names = {"learning_rate": "name"}

    assert fails(Renamed, {"learning_rate": 1}).hint == "did you mean 'name'?"
    places, checked = [config.Config], 0
    while places:
        place = places.pop()
        inner = [settings._model_in(field.annotation) for field in place.model_fields.values()]
        places += [one for one in inner if one]
        assert set(place.original_names.values()) <= set(place.model_fields)
        assert not place.original_names.keys() & place.model_fields.keys()
        checked += len(place.original_names)
    assert checked
    error = fails(config.Config, {"rae": {"autoencoder": {"pretrained_decoder_path": "model.pt"}}})
    assert error.hint == "did you mean 'rae.autoencoder.init_from'?"


def test_several_bad_keys_are_all_named():
    error = fails(Section, {"wrokers": 3, "optimiser": {"lr": -1}, "kind": "linear"})
    assert "'wrokers'" in error.message
    assert "optimiser.lr = -1" in error.message
    assert "kind = 'linear'" in error.message
    assert "'step' or 'cosine'" in error.message
    assert "did you mean 'workers'?" in error.hint


@pytest.mark.parametrize("value", ["zyxwvu", 12, None])
def test_a_key_like_no_other_still_has_a_hint(value):
    assert fails(Section, {"zyxwvu": value}).hint


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "x", None, [1], 0])
def test_bad_values_name_the_key(value):
    assert "optimiser.lr = " in fails(Section, {"optimiser": {"lr": value}}).message


@pytest.mark.parametrize(
    "given,says",
    [
        ({"vase": {"classifier": {"epochs": "many"}}}, "vase.classifier.epochs = 'many': expected a whole number"),
        ({"busi": {"methods": "lora"}}, "busi.methods = 'lora': expected a list"),
        ({"vase": {"classifier": {"lr": "fast"}}}, "vase.classifier.lr = 'fast': expected a number"),
        ({"rescan": "perhaps"}, "rescan = 'perhaps': expected true or false"),
        ({"vase": {"classifier": {"schedule": "x"}}}, "vase.classifier.schedule = 'x': expected '"),
        ({"vase": {"classifier": {"dropout": [0.1]}}}, "vase.classifier.dropout.1 is missing in [0.1]"),
        ({"vase": {"split": {"train": 0.9}}}, "vase.split = {'train': 0.9}: train + validation + test must be 1"),
        ({"vase": 3}, "vase = 3: expected key: value pairs"),
    ],
)
def test_what_is_wrong_is_said_in_the_words_of_a_config_file(tmp_path, given, says):
    user = tmp_path / "config.yaml"
    with pytest.raises(KilnError) as caught:
        config.load(given, user)
    assert caught.value.message.startswith(f"settings from --configfile or --config: {says}")
    user.write_text(json.dumps(given))  # which is YAML, too
    with pytest.raises(KilnError) as caught:
        config.load({}, user)
    assert caught.value.message.startswith(f"settings from {user}: {says}")


def told(given: dict, user: Path, *origins: tuple[str, dict]) -> KilnError:
    with pytest.raises(KilnError) as caught:
        config.load(given, user, lambda: origins)
    return caught.value


def test_each_wrong_key_is_told_with_where_it_was_given(tmp_path):
    user = tmp_path / "config.yaml"
    user.write_text("vase: {classifier: {epochs: many, lr: 0.1}}\nbusi: {split: {train: 0.9}}\n")
    file = {"vase": {"classifier": {"lr": "fast"}}, "device": "gpu"}
    line = {"device": "tpu", "set": "vase.classifier.gamma=x busi.split.test=0.3"}
    error = told(settings.merge(file, line), user, ("my.yaml", file), ("--config", line))
    assert f"settings from {user}: vase.classifier.epochs = 'many'" in error.message
    assert "settings from my.yaml: vase.classifier.lr = 'fast'" in error.message
    assert "settings from --config: device = 'tpu'" in error.message
    assert "settings from --config set=...: vase.classifier.gamma = 'x'" in error.message
    assert f"settings from {user} and --config set=...: busi.split = " in error.message, "two gave shares of one split"


def test_origins_that_do_not_make_up_what_was_given_are_not_named(tmp_path):
    """As where another workflow gives a part of its own configuration."""
    wrong = {"vase": {"classifier": {"lr": "fast"}}}
    error = told(wrong, tmp_path / "none.yaml", ("outer.yaml", {"kiln": wrong}))
    assert error.message.startswith("settings from --configfile or --config: vase.classifier.lr")


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ({"device": "gpu"}, 'device: text; default "auto"; auto, cpu or cuda:N, for every step with a model'),
        ({"vase": {"classifier": {"epochs": 0}}}, "vase.classifier.epochs: whole number, > 0; default 200; passes"),
        ({"vase": {"classifier": {"dropout": [0.1]}}}, "vase.classifier.dropout: list of 2: number; default ["),
        ({"resources": {"light": {"gpu": -1}}}, "resources.light.gpu: whole number, ≥ 0; default 0; GPUs of a node"),
        ({"vase": 3}, "config/default.yaml lists every key with its default"),
        ({"busi": {"split": {"train": 0.9}}}, "config/default.yaml lists every key with its default"),
    ],
)
def test_the_hint_of_a_bad_value_says_what_is_allowed_and_the_default(tmp_path, given, hint):
    assert told(given, tmp_path / "none.yaml").hint.startswith(hint)


def test_keys_without_a_default_or_a_meaning_have_their_type(tmp_path):
    class Required(Settings):
        name: str
        watch: Watch | None = None

    assert fails(Required, {"name": 3}).hint == "name: text"
    assert fails(Required, {"name": "x", "watch": {"url": 3}}).hint == "watch: {url: text} or null; default null"


def test_settings_cannot_change():
    with pytest.raises(ValidationError):
        Section().optimiser.lr = 2.0
    assert pickle.loads(pickle.dumps(Section(name="x"))) == Section(name="x")


def test_yaml_text_1e_4_becomes_a_float(tmp_path):
    path = tmp_path / "lr=1.yaml"
    path.write_text("optimiser: {lr: 1e-4}\n")
    assert settings.from_sources(Section, [str(path)]).optimiser.lr == 1e-4


def test_sources_come_on_top_of_each_other(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text("optimiser:\n  lr: 0.5\n  betas: [0.1, 0.2]\nname: file\n")
    sources = [str(path), '{"optimiser": {"lr": 0.25}, "workers": 1}', "optimiser.lr=1e-4"]
    made = settings.from_sources(Section, sources)
    assert (made.optimiser.lr, made.optimiser.betas, made.name, made.workers) == (1e-4, (0.1, 0.2), "file", 1)
    back = settings.from_sources(Section, reversed(sources))
    assert (back.optimiser.lr, back.workers) == (0.5, 1)
    assert settings.from_sources(Section, []) == Section()


def test_a_path_with_an_equals_sign_is_a_path(tmp_path):
    folder = tmp_path / "lr=1e-4"
    folder.mkdir()
    (folder / "c.yaml").write_text("workers: 9")
    assert settings.from_sources(Section, [str(folder / "c.yaml")]).workers == 9


@pytest.mark.parametrize(
    "content", [b"a: [1", b"- 1\n- 2\n", b"just text", b"\xff\xfe\x00", b"a: 1\n b: 2", b"a: !!python/name:os.system x"]
)
def test_a_file_that_is_no_mapping_is_named(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(KilnError) as caught:
        settings.read_yaml(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "name", "lines"),
    [("a: {b: 1}\nc: 2\na: {d: 1}\n", "a", "1 and 3"), ("a:\n  - {b: 1, c: 2, b: 3}\n", "b", "2 and 2")],
)
def test_a_key_that_stands_twice_is_refused_with_its_lines(tmp_path, content, name, lines):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(KilnError, match=f"key '{name}' stands twice, in lines {lines}"):
        settings.read_yaml(tmp_path / "c.yaml")


def test_merge_keys_of_yaml_may_be_overridden(tmp_path):
    (tmp_path / "c.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")
    assert settings.read_yaml(tmp_path / "c.yaml")["b"] == {"x": 3, "y": 2}


def test_an_empty_file_says_nothing(tmp_path):
    for text in ("", "# only a comment\n", "---\n"):
        (tmp_path / "c.yaml").write_text(text)
        assert settings.read_yaml(tmp_path / "c.yaml") == {}


@pytest.mark.parametrize("source", ["/nowhere/config.yaml", '{"a": 1', "{a: 1}", "."])
def test_unusable_sources_have_a_hint(source):
    with pytest.raises(KilnError) as caught:
        settings.from_sources(Section, [source])
    assert source in caught.value.message
    assert caught.value.hint


def leaves(model: Settings, prefix=()):
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, Settings):
            yield from leaves(value, (*prefix, name))
        else:
            yield (*prefix, name)


def paths(values, model: Settings, prefix=()):
    for name, value in values.items():
        inner = getattr(model, name)
        if isinstance(inner, Settings):
            yield from paths(value, inner, (*prefix, name))
        else:
            yield (*prefix, name)


@pytest.mark.parametrize("made", [config.Config(), Section(), Section(second=Optimiser(lr=3), stages=(Optimiser(),))])
def test_every_field_is_of_exactly_one_kind(made):
    numerics, execution_ = (settings.of_kind(made, kind) for kind in ("numerics", "execution"))
    both = sorted(paths(numerics, made)) + sorted(paths(execution_, made))
    assert sorted(both) == sorted(leaves(made))
    assert type(made).model_validate(settings.merge(numerics, execution_)) == made
    text = settings.to_json(numerics)
    assert json.loads(text) == numerics


def test_kinds_follow_the_declaration():
    numerics, running = (settings.of_kind(Section(), kind) for kind in ("numerics", "execution"))
    assert numerics == {
        "name": "plain",
        "kind": "step",
        "weights": None,
        "sides": ["train"],
        "optimiser": {"lr": 1e-3, "betas": [0.9, 0.999]},
        "second": None,
        "stages": [],
    }
    assert running == {"optimiser": {"log_every": 10}, "watch": {"url": "none"}, "workers": 4}


def test_an_execution_setting_leaves_the_numerics_alone():
    changed = Section(workers=0, watch=Watch(url="x"), optimiser=Optimiser(log_every=1))
    assert settings.of_kind(changed, "numerics") == settings.of_kind(Section(), "numerics")
    assert settings.of_kind(Section(optimiser=Optimiser(lr=2)), "numerics") != settings.of_kind(Section(), "numerics")


def test_machine_settings_of_the_project_are_execution():
    numerics = settings.of_kind(config.Config(), "numerics")
    assert "device" not in numerics
    assert not any(numerics["resources"].values())
    running = settings.of_kind(config.Config(), "execution")
    assert running["vase"]["classifier"].keys() == {
        "workers", "save_minutes", "budget_minutes", "stall_minutes", "tracker",
    }  # fmt: skip


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none() | st.floats(allow_nan=False), max_size=5))
def test_canonical_json_does_not_know_the_order(values):
    backwards = dict(reversed(list(values.items())))
    assert settings.to_json(values) == settings.to_json(backwards)
    assert json.loads(settings.to_json(values)) == values


def test_sources_of_a_run_come_in_their_order(tmp_path):
    """Models, the user's file, --configfile, --config set: each wins over those before it."""
    user = tmp_path / "config.yaml"
    user.write_text("vase:\n  classifier: {lr: 0.2, epochs: 2, gamma: 0.2}\n")
    given = {"vase": {"classifier": {"lr": 0.3, "epochs": 3}}, "set": "vase.classifier.lr=4e-1"}
    made = config.load(given, user).vase.classifier
    default = config.Config().vase.classifier
    assert (made.lr, made.epochs, made.gamma, made.batch_size) == (0.4, 3, 0.2, default.batch_size)
    assert given["set"] == "vase.classifier.lr=4e-1"
    assert config.load({}, tmp_path / "none.yaml") == config.Config()


@pytest.mark.parametrize("key", ["biomedica.hf_token", "biomedica.remote.token", "HF_TOKEN"])
def test_a_token_is_refused_and_not_repeated(key, tmp_path):
    with pytest.raises(KilnError) as caught:
        config.load({"set": f"{key}=hf_abcdef"}, tmp_path / "none.yaml")
    assert "export it as HF_TOKEN" in caught.value.hint
    assert "hf_abcdef" not in str(caught.value)


@pytest.mark.parametrize("source", ["user", "configfile", "set"])
def test_an_unknown_key_stops_wherever_it_stands(tmp_path, source):
    user = tmp_path / "config.yaml"
    user.write_text("vase: {clasifier: {lr: 1}}" if source == "user" else "")
    given = {"configfile": {"vase": {"clasifier": {"lr": 1}}}, "set": {"set": "vase.clasifier.lr=1"}}.get(source, {})
    with pytest.raises(KilnError) as caught:
        config.load(given, user)
    assert "'vase.clasifier'" in caught.value.message
    assert "'vase.classifier'" in caught.value.hint


@pytest.mark.parametrize("given", [{"device": "gpu"}, {"set": "device=cpu:1"}, {"set": "vase.split.train=0.9"}])
def test_bad_values_stop_a_run(tmp_path, given):
    with pytest.raises(KilnError):
        config.load(given, tmp_path / "none.yaml")


def test_section_finds_nested_settings():
    assert config.section(config.Config(), "vase.classifier") == config.Config().vase.classifier


def test_the_generated_files_are_up_to_date():
    assert config.stale() == "", f"run `make config`\n{config.stale()}"


def test_staleness_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "ROOT", tmp_path)
    for folder in ("config", "docs"):
        (tmp_path / folder).mkdir()
    assert "+results: results" in config.stale()
    for path, text in config.generated().items():
        path.write_text(text)
    assert config.stale() == ""
    path = tmp_path / "config/default.yaml"
    path.write_text(path.read_text().replace("seed: 42", "seed: 43", 1))
    assert "-    seed: 43" in config.stale()
    assert "+    seed: 42" in config.stale()


def test_default_file_is_the_models(root):
    path = root / "config/default.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config.load(values, root / "none.yaml") == config.Config()
    assert config.load({}, path) == config.Config()


@pytest.mark.parametrize("name", ["default.yaml", "demo.yaml", "smoke.yaml"])
def test_shipped_files_follow_the_schema(root, name):
    schema = json.loads((root / "config/schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    values = yaml.safe_load((root / "config" / name).read_text(encoding="utf-8"))
    jsonschema.validate(values, schema)
    config.load(values, root / "none.yaml")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**values, "vsae": {}}, schema)


def test_resolved_config_reads_back(tmp_path):
    made = config.load({"set": "vase.classifier.lr=3e-5 device=cpu"}, tmp_path / "none.yaml")
    (tmp_path / "resolved.yaml").write_text(config.to_yaml(made))
    assert config.load({}, tmp_path / "resolved.yaml") == made


def test_sections_name_resource_classes():
    """What a section may name as its class is in the one table; a name that is not there is refused with the others."""
    allowed = set(config.ResourceClasses.model_fields)
    assert allowed == {"light", "cpu", "gpu_single", "gpu_node", "multi_node", "network"}
    for section, name in (
        ("vase", "train_resources"),
        *((s, "resources") for s in ("busi", "rae", "coca", "biomedica")),
    ):
        made = settings.validate(config.Config, {section: {name: "multi_node"}}, "a test")
        assert config.section(made, f"{section}.{name}") == "multi_node"
        error = fails(config.Config, {section: {name: "gpu_nodes"}})
        assert f"{section}.{name} = 'gpu_nodes'" in str(error)
        for one in ("gpu_single", "gpu_node", "multi_node"):
            assert one in allowed and repr(one) in str(error)
    with pytest.raises(KilnError, match="give one of light, cpu"):
        config.resource_class(config.Config(), "gpu_nodes")


def test_a_class_keeps_the_values_that_are_not_given(tmp_path):
    made = config.load({"set": "resources.multi_node.gpu=4 resources.light.mem_mb=500"}, tmp_path / "none").resources
    whole = config.Config().resources
    assert made.multi_node == whole.multi_node.model_copy(update={"gpu": 4})
    assert made.light == whole.light.model_copy(update={"mem_mb": 500})
    assert made.cpu == whole.cpu
    with pytest.raises(KilnError, match="resources.light.memory"):
        config.load({"set": "resources.light.memory=500"}, tmp_path / "none")


def test_keys_of_a_value_are_found():
    made = config.load({"busi": {"images": "/data/both"}, "vase": {"images": "/data/both"}}, Path("none"))
    assert config.keys_of(made, "/data/both") == ["busi.images", "vase.images"]
    assert config.keys_of(made, "/nowhere") == []
