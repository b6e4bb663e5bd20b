import pytest


def test_a_missing_tool_skips_here_and_fails_on_ci(require_tool, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no-such-browser is not installed"):
        require_tool("no-such-browser")
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="on CI every test must run"):
        require_tool("no-such-browser")
    assert require_tool("python3").endswith("python3")
