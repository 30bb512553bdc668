"""A number's code version covers what it imports, and nothing else."""

from harness import code


def fresh(monkeypatch, files: dict[str, str], tmp_path):
    """`code` looking at these modules instead of the project's."""
    for name, text in files.items():
        path = tmp_path / f"{name}.py"
        path.write_text(text)
    for function in (code._tree, code._imports):
        function.cache_clear()
    monkeypatch.setattr(code, "_source", lambda m: p if (p := tmp_path / f"{m}.py").exists() else None)
    version = code.code_version("a")
    for function in (code._tree, code._imports):
        function.cache_clear()
    return version


FILES = {"a": "import b", "b": "x = 1", "c": "y = 1"}


def test_only_meaning_counts(monkeypatch, tmp_path):
    original = fresh(monkeypatch, FILES, tmp_path)
    assert fresh(monkeypatch, {**FILES, "b": "x  =  1  # a comment"}, tmp_path) == original
    assert fresh(monkeypatch, {**FILES, "c": "y = 2"}, tmp_path) == original  # not imported
    assert fresh(monkeypatch, {**FILES, "b": "x = 2"}, tmp_path) != original
    assert fresh(monkeypatch, {**FILES, "a": "def f():\n    import b\n    import c"}, tmp_path) != original


def test_sources_that_a_module_may_compile_count(monkeypatch, tmp_path):
    (tmp_path / "csrc").mkdir()
    versions = set()
    for text in ("int x;", "int y;"):
        (tmp_path / "csrc" / "kernel.cpp").write_text(text)
        versions.add(fresh(monkeypatch, FILES, tmp_path))
    assert len(versions) == 2


def test_the_closure_of_a_method_reaches_the_kernels():
    reached, waiting = set(), ["methods.rtn"]
    while waiting:
        module = waiting.pop()
        reached.add(module)
        waiting.extend(m for m in code._imports(module) if m not in reached)
    assert {"methods.base", "methods.formats.integer", "kernels.packing"} <= reached
    assert "methods.gptq" not in reached
