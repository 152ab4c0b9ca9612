"""Make a Python interpreter for 64-bit Arm that runs on this machine, emulated by qemu.

    python tools/arm64.py FOLDER        # then: FOLDER/python -m edgephi demo

FOLDER gets Debian's Python for arm64 with the libraries it needs, edgephi's dependencies as wheels for that processor,
edgephi itself as it is in this checkout, and `python`, a script that runs all this under `qemu-aarch64-static`. Nothing
is installed on this machine, nothing is mounted, and root is not needed. Run it again to take over changes of edgephi;
what does not change with them is kept.

The interpreter may start child processes: to a child it is the script, and the system runs scripts of any processor.
Needs Debian on x86-64, and its package mirror. Exit status 3: this machine cannot do it, and stderr says why.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
CANNOT = 3
QEMU = "qemu-aarch64-static"
DEBS = ("python3", "libstdc++6")
TESTS_NEED = ("pytest>=8", "pytest-timeout>=2.3")
OLDEST_GLIBC, NEWEST_GLIBC = 17, 36
"""Of the wheels that are taken; 2.36 is Debian 12's."""
FEATURES = "fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimdrdm jscvt fcma lrcpc asimddp i8mm bf16"
CPU = "max,sve=off,sme=off"
"""qemu's name of the processor: a Snapdragon X has neither SVE nor SME."""


class CannotError(Exception):
    """This machine cannot make the interpreter."""


def main() -> None:
    parser = argparse.ArgumentParser(description="An emulated Python for 64-bit Arm, with edgephi in it.")
    parser.add_argument("folder", type=Path, help="where it is made")
    folder = parser.parse_args().folder.resolve()
    try:
        make_interpreter(folder)
    except CannotError as error:
        print(f"no emulated Arm64 here: {error}", file=sys.stderr)
        raise SystemExit(CANNOT) from None
    except OSError as error:
        print(f"the interpreter cannot be made: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(folder / "python")


def make_interpreter(folder: Path) -> None:
    """Make it, or bring it up to date.

    Raises:
        CannotError: this is no Debian on x86-64, or its packages cannot be fetched.
        SystemExit: pip failed.
    """
    root, libraries = folder / "root", folder / "libraries"
    if not (folder / "python").exists():
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(libraries, ignore_errors=True)
        fetch_system(folder, root)
    version = next(root.glob("usr/bin/python3.[0-9]*")).name.removeprefix("python")
    if not libraries.exists():
        fetch_libraries(libraries, version)
    install_edgephi(folder / "edgephi")
    write_script(folder, root, version, (folder / "edgephi", libraries))


def fetch_system(folder: Path, root: Path) -> None:
    """qemu, and Debian's Python for arm64 in a folder that looks like the root of a system."""
    sources = debian_sources()
    root.mkdir(parents=True, exist_ok=True)
    with fetched_packages(folder, "arm64", sources, DEBS) as packages:
        for package in packages:
            subprocess.run(["dpkg-deb", "--extract", package, root], check=True)
    if not shutil.which(QEMU):
        with fetched_packages(folder, "amd64", sources, ("qemu-user-static",)) as packages:
            if not any(unpack_file(package, f"./usr/bin/{QEMU}", folder / QEMU) for package in packages):
                raise CannotError(f"Debian's packages have no {QEMU}")
    # onnxruntime reads it, and crashes where it lists fewer processors than the system has
    described = "".join(
        f"processor\t: {number}\nFeatures\t: {FEATURES}\nCPU implementer\t: 0x51\nCPU architecture: 8\n"
        "CPU variant\t: 0x2\nCPU part\t: 0x001\nCPU revision\t: 1\n\n"
        for number in range(os.cpu_count() or 1)
    )
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/cpuinfo").write_text(described, encoding="ascii")


def debian_sources() -> Path:
    """The file that names the mirror.

    Raises:
        CannotError: this is no Debian on x86-64, or there is no such file.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise CannotError(f"it is made on Linux on x86-64, and this is {sys.platform} on {platform.machine()}")
    try:
        system = platform.freedesktop_os_release().get("ID", "an unknown system")
    except OSError:
        system = "an unknown system"
    if system != "debian":
        raise CannotError(f"it is made of Debian's packages, and this is {system}")
    for tool in ("apt-get", "dpkg-deb"):
        if not shutil.which(tool):
            raise CannotError(f"{tool} is not installed")
    for place in ("/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list"):
        if Path(place).is_file():
            return Path(place)
    raise CannotError("apt has no file of Debian's sources")


@contextmanager
def fetched_packages(folder: Path, architecture: str, sources: Path, names: Sequence[str]) -> Iterator[list[Path]]:
    """Packages with all they need, downloaded for as long as the block lasts; apt works in folders of its own.

    Raises:
        CannotError: apt does not get them.
    """
    work = folder / f"packages-{architecture}"
    for part in ("state/lists/partial", "cache/archives/partial", "sources"):
        (work / part).mkdir(parents=True, exist_ok=True)
    shutil.copy(sources, work / "sources" / ("debian" + (sources.suffix or ".list")))
    settings = {
        "Dir::State": work / "state",
        "Dir::State::status": "/dev/null",  # as if nothing were installed, so everything needed comes along
        "Dir::Cache": work / "cache",
        "Dir::Etc::sourcelist": "/dev/null",
        "Dir::Etc::sourceparts": work / "sources",
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Acquire::Retries": "2",
        "Acquire::http::Timeout": "30",
    }
    apt = ["apt-get", "-qq", *(word for key, value in settings.items() for word in ("-o", f"{key}={value}"))]
    for command in (["update", "--error-on=any"], ["--yes", "--download-only", "install", *names]):
        done = subprocess.run([*apt, *command], capture_output=True, text=True)
        if done.returncode:
            said = " ".join(done.stderr.split())[-300:]
            raise CannotError(f"apt-get {command[0]} for {architecture} failed: {said}")
    try:
        yield sorted((work / "cache/archives").glob("*.deb"))
    finally:
        shutil.rmtree(work)


def unpack_file(package: Path, name: str, target: Path) -> bool:
    """One executable file out of a package; whether it is there. qemu's has emulators of forty processors."""
    command = ["dpkg-deb", "--fsys-tarfile", package]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as unpacking,
        tarfile.open(fileobj=unpacking.stdout, mode="r|") as files,
    ):
        try:
            for file in files:
                if file.name == name and (content := files.extractfile(file)):
                    target.write_bytes(content.read())
                    target.chmod(0o755)
                    return True
        finally:
            unpacking.kill()  # it would wait for somebody to read the rest
    return False


def fetch_libraries(target: Path, version: str) -> None:
    """Wheels of what edgephi depends on, and of pytest, for arm64."""
    with (PROJECT / "pyproject.toml").open("rb") as stream:
        needed: list[str] = tomllib.load(stream)["project"]["dependencies"]
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in range(NEWEST_GLIBC, OLDEST_GLIBC - 1, -1)]
    kinds = [word for name in (*platforms, "manylinux2014_aarch64") for word in ("--platform", name)]
    abis = [word for abi in (f"cp{version.replace('.', '')}", "abi3", "none") for word in ("--abi", abi)]
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        kind = [*kinds, "--python-version", version, "--implementation", "cp", *abis]
        pip("--no-compile", "--only-binary=:all:", *kind, "--target", f"{scratch}/made", *needed, *TESTS_NEED)
        (Path(scratch) / "made").rename(target)


def install_edgephi(target: Path) -> None:
    """The package as it is installed, from a copy of its sources: setuptools writes beside what it builds."""
    with (PROJECT / "pyproject.toml").open("rb") as stream:
        folders = tomllib.load(stream)["tool"]["setuptools"]["package-dir"].values()
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name in folders:
            ignored = shutil.ignore_patterns("__pycache__", "reports")
            shutil.copytree(PROJECT / name, Path(scratch) / name, ignore=ignored)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(PROJECT / name, scratch)
        pip("--no-compile", "--no-deps", "--target", str(target), scratch)


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *arguments]
    done = subprocess.run(command)
    if done.returncode:
        raise SystemExit(f"pip failed with status {done.returncode}")


def write_script(folder: Path, root: Path, version: str, packages: Sequence[Path]) -> None:
    """The interpreter: a script, so that the system can run it as a child process without knowing Arm."""
    qemu = shutil.which(QEMU) or str(folder / QEMU)
    script = folder / "python"
    path = ":".join(map(str, packages))
    script.write_text(
        "#!/bin/sh\n"
        "unset LD_LIBRARY_PATH LD_PRELOAD\n"
        f"export PYTHONHOME={shlex.quote(f'{root}/usr')}\n"
        f"export PYTHONPATH={shlex.quote(path)}:${{EDGEPHI_ARM64_PATH:-}}\n"
        f'export QEMU_CPU="${{QEMU_CPU:-{CPU}}}"\n'
        f"exec {shlex.quote(qemu)} -0 {shlex.quote(str(script))} -L {shlex.quote(str(root))}"
        f' {shlex.quote(f"{root}/usr/bin/python{version}")} "$@"\n',
        encoding="utf-8",
    )
    script.chmod(0o755)


if __name__ == "__main__":
    main()
