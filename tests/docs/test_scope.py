"""The folders keep to the budgets of SCOPE.md, and one that does not is named."""

from docs import scope

TABLE = """
## Budgets

| folder | lines |
|---|---|
| `house/*.py` | 3 |
| `house` | 5 |
| `house/room` | 4 |
"""


def test_every_file_of_the_product_has_a_budget():
    table = scope.budgets((scope.ROOT / "SCOPE.md").read_text("utf-8"))
    assert scope.main([]) == 0
    covered = {
        file for row in table for part in row.split() for file in scope._files(scope.ROOT, part)
    }
    product = [p for top in ("bilora_diffusion", "eval", "app", "benchmarks", "docs", "examples")
               for p in (scope.ROOT / top).rglob("*.py")]  # fmt: skip
    assert set(product) <= covered


def test_a_folder_above_its_budget_fails(tmp_path, monkeypatch, capsys):
    (tmp_path / "SCOPE.md").write_text(TABLE)
    for name, lines in {"house/a.py": 3, "house/hall/b.py": 2, "house/room/c.py": 4}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x\n" * lines)
    monkeypatch.setattr(scope, "ROOT", tmp_path)
    assert scope.main([]) == 0
    (tmp_path / "house/room/d.py").write_text("x\n")
    assert scope.main([]) == 1
    assert capsys.readouterr().out == "house/room: 5 lines, 4 in SCOPE.md: take something out.\n"
