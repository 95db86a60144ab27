"""The commands `shorttail stat`, `verify` and `backup`, on a store with a model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_cli import Project, write_project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = write_project(tmp_path)
    project.ok("apply", "definitions.py", "--store", "store", "--create")
    project.ok("materialize", "--store", "store")
    return project


def test_stat_prints_views_file_commits_and_readers(project: Project) -> None:
    lines = project.ok("stat", "--store", "store").out.splitlines()
    assert lines[0].split() == ["view", "keys", "features", "rows", "fill", "size", "depth"]
    assert lines[1].split()[:4] == ["plane", "tailnum", "3", "3"]
    assert lines[1].split()[5:] == ["4.0", "KiB", "0"]
    assert lines[2].split() == ["route", "origin,", "dest_id", "1", "0", "-", "0", "bytes", "0"]
    assert re.fullmatch(r"file: [\d.]+ KiB, [\d.]+ (KiB|bytes) of it free; may grow to 256.0 GiB", lines[3])
    assert re.fullmatch(r"commit: \d+, the log of changes from 1 on \([\d.]+ (KiB|bytes)\)", lines[4])
    assert lines[5:] == ["max_clock_skew: 1h", "readers: none"]


def test_verify_says_what_it_read(project: Project) -> None:
    said = project.ok("verify", "--store", "store").out
    assert re.fullmatch(r"store: sound as of commit \d+; 2 views, 3 rows, 1 page, 1 model version in \d+\.\d s\n", said)
    found = project.ok("verify", "--store", "store", "--json").json
    assert (found["ok"], found["rows"], found["model_versions"], found["problems"]) == (True, 3, 1, [])


def test_verify_of_a_damaged_model_and_page(project: Project) -> None:
    model = project.folder / "store" / "models" / "delay" / "1" / "model.onnx"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 4
    model.write_bytes(content)
    (model.parent / "manifest.json").write_text("{}")
    file = project.folder / "store" / "data.mdb"
    data = bytearray(file.read_bytes())
    for at in (found.start() for found in re.finditer(b"BOEING", bytes(data))):
        data[at] ^= 1
    file.write_bytes(data)
    result = project.run("verify", "--store", "store")
    lines = result.out.splitlines()
    assert result.code == 1
    assert result.err == "error: store 'store' is damaged (3 problems); restore it from a backup\n"
    assert re.fullmatch(
        r"problem: view 'plane' \(table \d+\), bucket 0000000000000000: its checksum is wrong", lines[0]
    )
    assert lines[1:] == [
        "problem: model 'delay' version 1: the sha256 of model.onnx is not the catalog's",
        "problem: model 'delay' version 1: the sha256 in manifest.json is not the catalog's",
    ]
    assert project.run("verify", "--store", "store", "--json").code == 1
    error = project.fails("backup", "copy", "--store", "store")
    assert error == "error: model 'delay': the file of version 1 is damaged; run `shorttail verify`\n"
    assert not (project.folder / "copy").exists()


def test_verify_of_a_truncated_file(project: Project) -> None:
    file = project.folder / "store" / "data.mdb"
    file.write_bytes(file.read_bytes()[: 4096 * 5])
    result = project.run("verify", "--store", "store")
    assert result.code == 1
    assert result.out.startswith("note: the tables were not read, as LMDB's structure is damaged\nproblem: data.mdb: ")


def test_a_backup_is_a_store_that_answers_the_same(project: Project) -> None:
    said = project.ok("backup", "copy", "--store", "store").out
    assert re.fullmatch(r"copy: 2 views, 1 model version, [\d.]+ KiB as of commit \d+ in \d+\.\d s\n", said)
    assert project.fails("backup", "copy", "--store", "store") == (
        "error: 'copy' exists; a backup never overwrites anything, so choose another name\n"
    )
    project.ok("verify", "--store", "copy")
    asked = ["predict", "delay", "tailnum=N1", "hour=3", "--json", "--store"]
    assert project.ok(*asked, "copy").json == project.ok(*asked, "store").json
    checked = project.process("serve", "--check", "--lock-memory", "--store", "copy")
    assert checked.stdout.startswith("ok · models: delay v1"), checked
    done = json.loads(project.ok("backup", "second", "--store", "copy", "--as-is", "--json").out)
    assert (done["backup"], done["views"], done["model_versions"]) == ("second", 2, 1)
    names = {"copy", "second", "store", "definitions.py", "delay.onnx", "planes.parquet"}
    assert {entry.name for entry in project.folder.iterdir()} - {"__pycache__"} == names
