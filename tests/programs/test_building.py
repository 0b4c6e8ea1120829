"""Programs that build and unpack: make, Python's compileall and pip, zip, unzip and 7z."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.support import Mounter, differences, noise, run, snapshot

PAST = 1_000_000_000_123_456_789

PROJECT = {
    "Makefile": """\
CFLAGS = -O1 -Wall
objects = main.o count.o text.o

program: $(objects)
\t$(CC) -o $@ $(objects)
main.o: main.c count.h text.h
count.o: count.c count.h
text.o: text.c text.h
clean:
\trm -f program $(objects)
.PHONY: clean
""",
    "main.c": """\
#include <stdio.h>
#include "count.h"
#include "text.h"

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++)
        printf("%s %d\\n", text_upper(argv[i]), count_vowels(argv[i]));
    return 0;
}
""",
    "count.h": "int count_vowels(const char *text);\n",
    "count.c": """\
#include <string.h>
#include "count.h"

int count_vowels(const char *text) {
    int count = 0;
    for (; *text; text++)
        count += strchr("aeiouAEIOU", *text) != NULL;
    return count;
}
""",
    "text.h": "const char *text_upper(const char *text);\n",
    "text.c": """\
#include <ctype.h>
#include <stdlib.h>
#include <string.h>
#include "text.h"

const char *text_upper(const char *text) {
    char *upper = strdup(text);
    for (char *c = upper; *c; c++)
        *c = toupper((unsigned char)*c);
    return upper;
}
""",
}


def write_project(work: Path) -> None:
    work.mkdir()
    for name, text in PROJECT.items():
        (work / name).write_text(text)


def compiled(work: Path) -> set[str]:
    """The targets that make has built by a command just now."""
    lines = run("make", "--jobs=2", cwd=work).stdout.splitlines()
    return {line.split("-o ")[1].split()[0] for line in lines if "-o " in line}


def set_times(work: Path, first: int) -> None:
    """Sources are older than objects, which are older than the program, each by a single nanosecond."""
    for order, pattern in enumerate(("*.[ch]", "*.o", "program")):
        for path in work.glob(pattern):
            os.utime(path, ns=(PAST, first + order))


@pytest.mark.semantics("make-works")
def test_make(folder: Path) -> None:
    """make builds a C program, which runs; after a change it builds what depends on it, and nothing else."""
    work = folder / "work"
    write_project(work)
    assert compiled(work) == {"main.o", "count.o", "text.o", "program"}
    assert run(work / "program", "mount", "queue").stdout == "MOUNT 2\nQUEUE 4\n"
    assert compiled(work) == set()

    set_times(work, PAST)
    assert compiled(work) == set()
    os.utime(work / "text.h", ns=(PAST, PAST + 2))  # one nanosecond after the objects
    assert compiled(work) == {"main.o", "text.o", "program"}
    assert compiled(work) == set()

    text = (work / "count.c").read_text().replace("aeiou", "u")
    (work / "count.c").write_text(text)
    assert compiled(work) == {"count.o", "program"}
    assert run(work / "program", "queue").stdout == "QUEUE 2\n"
    run("make", "clean", cwd=work)
    assert {path.name for path in work.iterdir()} == PROJECT.keys()


@pytest.mark.semantics("make-works")
def test_make_after_a_remount(bucket: str, mount: Mounter, tmp_path: Path) -> None:
    """After a remount make has nothing to do, also where times differ by a nanosecond, and the program runs."""
    first = mount(f"/{bucket}", folder=tmp_path)
    work = first.path / "work"
    write_project(work)
    compiled(work)
    set_times(work, PAST)
    assert first.finish() == []
    mount(f"/{bucket}", folder=tmp_path)
    assert compiled(work) == set()
    assert run(work / "program", "mount").stdout == "MOUNT 2\n"
    (work / "main.c").touch()
    assert compiled(work) == {"main.o", "program"}


@pytest.mark.semantics("programs-run-from-the-mount")
def test_program_in_use_is_replaced(folder: Path) -> None:
    """A running program cannot be written to (ETXTBSY); replaced by rename, it goes on and the new one starts."""
    write_project(folder / "work")
    compiled(folder / "work")
    program = folder / "cat"
    program.write_bytes(Path("/bin/cat").read_bytes())
    program.chmod(0o755)
    with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        running.stdin.write(b"one\n")
        running.stdin.flush()
        assert running.stdout.readline() == b"one\n"
        with pytest.raises(OSError, match="Text file busy"):
            program.open("r+b")
        (folder / "work/program").rename(program)
        assert run(program, "mount").stdout == "MOUNT 2\n"
        running.stdin.write(b"two\n")
        running.stdin.flush()
        assert running.stdout.readline() == b"two\n"
        running.stdin.close()
    assert running.returncode == 0


@pytest.mark.semantics("python-from-the-mount")
def test_python_packages(folder: Path) -> None:
    """compileall finds nothing to do the second time, and Python imports compiled modules from the mount."""
    run("cp", "-r", Path(sysconfig.get_path("stdlib"), "json"), folder / "copied")
    compile_all = (sys.executable, "-m", "compileall", folder / "copied")
    run("rm", "-rf", folder / "copied/__pycache__")
    names = {path.name for path in (folder / "copied").glob("*.py")}
    first = run(*compile_all).stdout
    assert first.count("Compiling ") == len(names)
    assert "Compiling " not in run(*compile_all).stdout
    (folder / "copied/tool.py").write_text("changed = True\n")
    os.utime(folder / "copied/tool.py", ns=(PAST, PAST))  # Python looks at whole seconds
    assert run(*compile_all).stdout.count("Compiling ") == 1
    program = "import copied.decoder, copied.tool; print(copied.loads('[1]'), copied.tool.changed)"
    done = run(sys.executable, "-v", "-c", program, cwd=folder)
    assert done.stdout == "[1] True\n"
    assert f"matches {folder}/copied/decoder.py" in done.stderr, "the compiled module was not used"


@pytest.mark.semantics("python-from-the-mount")
def test_pip_installs_onto_the_mount(folder: Path, tmp_path: Path) -> None:
    """pip installs a wheel into a folder of the mount, with its script, and replaces it by a newer one."""
    for version in ("1.0", "2.0"):
        wheel = tmp_path / f"sample-{version}-py3-none-any.whl"
        info = f"sample-{version}.dist-info"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("sample/__init__.py", f"def main():\n    print('{version}')\n")
            archive.writestr("sample/data", noise(200_000))
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: sample\nVersion: {version}\n")
            archive.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{info}/entry_points.txt", "[console_scripts]\nsample = sample:main\n")
            archive.writestr(f"{info}/RECORD", "")
        pip = (sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "install")
        run(*pip, "--no-index", "--no-deps", "--upgrade", "--target", folder / "site", wheel)
        environ = os.environ | {"PYTHONPATH": str(folder / "site")}
        assert run(folder / "site/bin/sample", env=environ).stdout == f"{version}\n"
        assert (folder / "site/sample/data").read_bytes() == noise(200_000)
    assert (folder / "site/sample-2.0.dist-info").is_dir()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files with even seconds and links, as archives of all kinds can keep them."""
    tree = tmp_path / "tree"
    (tree / "a/empty directory").mkdir(parents=True)
    (tree / "a/big").write_bytes(noise(700_000))
    (tree / "a/text").write_text("line\n" * 10_000)
    (tree / "a/program").write_text("#!/bin/sh\n")
    (tree / "a/program").chmod(0o755)
    (tree / "empty").touch()
    (tree / "name é").write_text("x")
    (tree / "link").symlink_to("a/text")
    for path in (*tree.rglob("*"), tree):
        os.utime(path, ns=(PAST // 10**9 * 10**9,) * 2, follow_symlinks=False)
    return tree


def unlike(left: Path, right: Path, *, directory_times: bool = True) -> list[str]:
    """The differences of two trees. unzip and 7z set no times of symbolic links."""

    def taken(top: Path) -> dict[str, tuple[object, ...]]:
        tree = snapshot(top, directory_times=directory_times)
        link = tree["./link"]
        return tree | {"./link": (*link[:3], *link[4:])}

    return differences(taken(left), taken(right))


@pytest.mark.semantics("archives-work")
def test_zip_and_unzip(folder: Path, tree: Path) -> None:
    """zip packs a tree onto the mount and updates the archive there; unzip makes the same tree."""
    run("cp", "-a", tree, folder / "tree")
    archive = folder / "archive.zip"
    run("zip", "-qry", archive, "tree", cwd=folder)
    run("unzip", "-q", archive, "-d", folder / "out")
    assert unlike(tree, folder / "out/tree") == []
    (folder / "tree/a/text").write_text("changed\n")
    os.utime(folder / "tree/a/text", (2_000_000_000, 2_000_000_000))
    assert "updating: tree/a/text" in run("zip", "-ryu", archive, "tree", cwd=folder).stdout
    run("unzip", "-qo", archive, "-d", folder / "out")
    assert unlike(folder / "tree", folder / "out/tree", directory_times=False) == []
    run("zip", "-qT", archive)
    assert [path.name for path in folder.iterdir() if path.is_file()] == ["archive.zip"]


@pytest.mark.semantics("archives-work")
def test_7z(folder: Path, tree: Path) -> None:
    """7z packs a tree onto the mount, tests and updates the archive there, and unpacks the same tree."""
    run("cp", "-a", tree, folder / "tree")
    archive = folder / "archive.7z"
    run("7z", "a", "-bd", "-snl", "-mx1", archive, "tree", cwd=folder)
    run("7z", "x", "-bd", "-snl", f"-o{folder / 'out'}", archive)
    assert unlike(tree, folder / "out/tree") == []
    (folder / "tree/new").write_text("new\n")
    run("7z", "u", "-bd", "-snl", "-mx1", archive, "tree", cwd=folder)
    run("7z", "t", "-bd", archive)
    assert "tree/new" in run("7z", "l", "-ba", archive).stdout
