"""Configurations that build on others: which wins, and what is said where one cannot be found."""

from __future__ import annotations

import pytest
import yaml

from effvit._cli.shipped import ROOT, merged_config, shipped_configs, with_bases
from effvit.errors import ConfigError


def write(folder, name, **content):
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_bases_come_first_and_each_once(tmp_path):
    root = write(tmp_path, "root", a=1)
    left, right = write(tmp_path, "left", base="root"), write(tmp_path, "right", base=["root.yaml"])
    top = write(tmp_path, "top", base=["left", "right"])
    assert with_bases(top) == [root, left, right, top]
    assert with_bases(root) == [root]


def test_the_later_one_wins_key_by_key_and_another_class_starts_anew(tmp_path):
    write(
        tmp_path, "one", trainer={"max_epochs": 1, "precision": "32"}, data={"class_path": "A", "init_args": {"x": 1}}
    )
    write(tmp_path, "two", trainer={"max_epochs": 2}, data={"init_args": {"y": 2}})
    top = write(tmp_path, "top", base=["one", "two"], trainer={"max_steps": 3})
    assert merged_config(top)["trainer"] == {"max_epochs": 2, "precision": "32", "max_steps": 3}
    assert merged_config(top)["data"] == {"class_path": "A", "init_args": {"x": 1, "y": 2}}
    other = write(tmp_path, "other", base="top", data={"class_path": "B"})
    assert merged_config(other)["data"] == {"class_path": "B"}


def test_a_shipped_base_is_found_from_anywhere_but_a_file_beside_comes_first(tmp_path):
    mine = write(tmp_path, "mine", base="detection/digits")
    assert with_bases(mine) == [shipped_configs()["detection/digits"], mine]
    base = with_bases(write(tmp_path, "on_a_base", base="_base/imagenet"))[0]
    assert base == ROOT / "_base" / "imagenet.yaml"
    (tmp_path / "detection").mkdir()
    own = write(tmp_path / "detection", "digits")
    assert with_bases(mine) == [own, mine]


def test_bases_are_not_listed():
    assert (ROOT / "_base" / "imagenet.yaml").is_file()
    assert not [name for name in shipped_configs() if name.startswith("_")]


def test_a_circle_is_refused_and_drawn(tmp_path):
    write(tmp_path, "one", base="two")
    two = write(tmp_path, "two", base="one")
    with pytest.raises(ConfigError, match=r"in a circle: .*two.yaml -> .*one.yaml -> .*two.yaml"):
        with_bases(two)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("_base/imagnet", "no base '_base/imagnet'.*Did you mean '_base/imagenet'"),
        (3, "base must be the name of a configuration"),
        ([["nested"]], "base must be the name of a configuration"),
    ],
)
def test_a_base_that_is_none_is_refused_with_the_file(tmp_path, base, message):
    with pytest.raises(ConfigError, match=message) as raised:
        with_bases(write(tmp_path, "mine", base=base))
    assert "mine.yaml" in str(raised.value)


def test_what_is_no_yaml_is_left_to_the_parser_and_refused_where_it_is_read_here(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("trainer: {max_epochs: 3")
    assert with_bases(broken) == [broken]
    with pytest.raises(ConfigError, match="is no YAML"):
        merged_config(broken)
    broken.write_text("just a word")
    with pytest.raises(ConfigError, match="holds no settings"):
        merged_config(broken)


def test_a_run_is_told_its_bases(cli, tmp_path, monkeypatch):
    """The parser sees what this room merges: the value of the file over that of its base."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "mine", base="detection/digits", trainer={"max_epochs": 2}, model={"init_args": {"head_convs": 3}})
    done = cli.run("fit", "-c", "mine.yaml", "--print_config")
    assert done.code == 0, done.err
    seen, meant = yaml.safe_load(done.out), merged_config(tmp_path / "mine.yaml")
    assert seen["trainer"]["max_epochs"] == 2
    assert seen["model"]["init_args"]["head_convs"] == 3
    assert seen["model"]["init_args"]["backbone"] == meant["model"]["init_args"]["backbone"]
    assert seen["data"]["init_args"]["num_train"] == meant["data"]["init_args"]["num_train"]
    assert seen["base"] == "detection/digits"

    done = cli.run("fit", "-c", "mine.yaml", "--base", "detection/finetune")
    assert done.code == 2
    assert "write -c detection/finetune" in done.err
