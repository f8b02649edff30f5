"""Discovery of methods: what is broken is named, and everything else keeps working."""

import sys

import pytest
from plugin_site import GOOD, install

from trackpl import cli
from trackpl.errors import PluginError
from trackpl.plugins import find, find_class, plugins


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty site-packages with one good plugin in it, whose modules are forgotten afterwards."""
    before = set(sys.modules)
    install(tmp_path, "good")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("trackpl_"):
            del sys.modules[name]


def fails(name):
    """The message with which loading `name` fails; the good plugin must load all the same."""
    with pytest.raises(PluginError) as caught:
        find(name).load()
    assert find("good").load().__name__ == "Good"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_fails(capsys, name, *words):
    """`trackpl plugins --check` must blame `name` alone and exit with 1."""
    assert cli.main(["plugins", "--check"]) == 1
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["good"].endswith("ok")
    assert "BROKEN" in lines[name]
    assert all(word in lines[name] for word in words), lines[name]


def test_a_plugin_is_found_by_name_and_by_class_path(site):
    plugin = plugins()["good"]
    assert (plugin.name, plugin.class_path) == ("good", "trackpl_good.Good")
    assert (plugin.package, plugin.version) == ("trackpl-good", "1.0")
    assert find("good").load() is find_class("trackpl_good.Good") is sys.modules["trackpl_good"].Good


def test_listing_imports_no_plugin(site, capsys):
    install(site, "bomb", "raise AssertionError('imported')")
    assert cli.main(["plugins"]) == 0
    assert "bomb" in capsys.readouterr().out
    assert "trackpl_good" not in sys.modules and "trackpl_bomb" not in sys.modules


def test_check_says_ok(site, capsys):
    cli.main(["plugins", "--check"])
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("good"))
    assert line.split() == ["good", "trackpl-good", "1.0", "trackpl_good.Good", "ok"]


def test_first_party_method_is_an_ordinary_entry_point(site):
    assert plugins()["crw_multiscale"].package == "trackpl"


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("import module_of_nobody", "ModuleNotFoundError: No module named 'module_of_nobody'"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("def broken(:", "SyntaxError"),
        ("", "AttributeError"),
    ],
)
def test_import_failure_names_plugin_package_version_and_cause(site, capsys, code, cause):
    install(site, "broken", code, version="0.2")
    message = fails("broken")
    assert message.startswith("method 'broken' of trackpl-broken 0.2: cannot be imported (")
    assert cause in message and "trackpl-broken" in message.rpartition(";")[2]
    check_fails(capsys, "broken", cause)


def test_missing_dependency_is_named_in_the_remedy(site):
    install(site, "broken", "import module_of_nobody.part")
    assert fails("broken").endswith("; install 'module_of_nobody', which trackpl-broken needs")


def test_import_failure_keeps_its_cause_for_debug(site):
    install(site, "broken", "raise ValueError('why')")
    with pytest.raises(PluginError) as caught:
        find("broken").load()
    assert isinstance(caught.value.__cause__, ValueError)


def test_missing_module_of_the_plugin_itself(site):
    install(site, "broken", value="trackpl_gone.method:Good")
    assert fails("broken").endswith("; fix, upgrade or uninstall trackpl-broken")


def test_two_packages_with_one_name(site, capsys):
    install(site, "twin", package="first-twin")
    install(site, "twin", package="second-twin", version="2.0")
    message = fails("twin")
    with pytest.raises(PluginError, match="conflict"):
        find_class("first_twin.Good")
    assert "conflict" in message and "uninstall" in message
    assert "first-twin 1.0" in message and "second-twin 2.0" in message
    assert cli.main(["plugins"]) == 0
    assert "conflict" in next(x for x in capsys.readouterr().out.splitlines() if x.startswith("twin"))
    check_fails(capsys, "twin", "conflict")


def test_a_second_name_for_a_class_is_no_conflict_and_outlives_one(site):
    install(site, "alias", entry_points="[trackpl.methods]\nalias = trackpl_alias:Good\nother = trackpl_alias:Good\n")
    assert find("alias").load() is find("other").load()
    install(site, "alias", package="rival")
    with pytest.raises(PluginError, match="conflict"):
        find("alias")
    assert find("other").load() is find_class("trackpl_alias.Good")


def test_one_distribution_seen_twice_is_no_conflict(site, monkeypatch):
    install(site / "again", "good", version="0.9")
    install(site / "other spelling", "good", package="TrackPL_Good", version="0.8")
    monkeypatch.syspath_prepend(str(site / "again"))
    sys.path.append(str(site / "other spelling"))
    assert plugins()["good"].version == "0.9"
    assert not plugins()["good"].fault


def test_unknown_name_gives_the_closest(site):
    with pytest.raises(PluginError, match=r"no installed method is called 'goood'; did you mean 'good'\?"):
        find("goood")
    with pytest.raises(PluginError, match=r"called 'zzzzzz'; allowed: .*good"):
        find("zzzzzz")
    with pytest.raises(PluginError, match=r"'trackpl_good.Goood'; did you mean 'trackpl_good.Good'\?"):
        find_class("trackpl_good.Goood")


@pytest.mark.parametrize(("contract", "upgrade"), [("0", "trackpl-old"), ("99", "trackpl"), ("None", "trackpl-old")])
def test_other_contract_says_what_to_upgrade(site, capsys, contract, upgrade):
    install(site, "old", GOOD.replace("contract = 1", f"contract = {contract}"), version="0.3")
    message = fails("old")
    assert message.startswith(f"method 'old' of trackpl-old 0.3: made for contract {contract}, ")
    assert "has contract 1" in message
    assert message.endswith(f"; pip install --upgrade {upgrade}")
    check_fails(capsys, "old", "made for contract")


@pytest.mark.parametrize("code", ["class Good: pass", "Good = 3"])
def test_not_a_method(site, capsys, code):
    install(site, "alien", code)
    assert "alien:Good is not a subclass of trackpl.Method; fix or uninstall trackpl-alien" in fails("alien")
    check_fails(capsys, "alien", "not a subclass")


@pytest.mark.parametrize("value", ["trackpl_bad", "trackpl_bad.Good", "trackpl bad:Good", ":Good", "a:b:c"])
def test_malformed_value(site, capsys, value):
    install(site, "bad", value=value)
    message = fails("bad")
    assert f"malformed entry point 'bad = {value}'" in message and "package.module:Class" in message
    check_fails(capsys, "bad", "malformed")


def test_malformed_name(site):
    install(site, "bad.name", package="trackpl-bad")
    assert "malformed name 'bad.name'" in fails("bad.name")


@pytest.mark.parametrize("text", ["[trackpl.methods]\nbad\n", "no header = trackpl.methods\n"])
def test_malformed_file(site, capsys, text):
    install(site, "bad", entry_points=text)
    (name,) = [plugin.name for plugin in plugins().values() if plugin.package == "trackpl-bad"]
    assert "trackpl-bad" in fails(name)
    assert cli.main(["plugins", "--check"]) == 1


def test_other_groups_and_comments_are_not_methods(site):
    text = "# trackpl.methods\n[console_scripts]\nfirst = a:b\n[trackpl.methods]\n; gone = x:Y\n"
    install(site, "quiet", entry_points=text)
    assert not [plugin for plugin in plugins().values() if plugin.package == "trackpl-quiet"]


def test_metadata_that_nobody_can_read_harms_nobody(site):
    install(site, "binary")
    (site / "trackpl_binary-1.0.dist-info" / "entry_points.txt").write_bytes(b"[trackpl.methods]\n\xff = a:b\n")
    install(site, "nameless")
    (site / "trackpl_nameless-1.0.dist-info" / "METADATA").unlink()
    assert "binary" not in plugins()
    assert plugins()["nameless"].package == "an unnamed package"
    assert find("good").load().__name__ == "Good"
