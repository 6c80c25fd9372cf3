#!/usr/bin/env python3
"""Fetches libtorch 2.11 into .libtorch/ out of PyTorch's own wheels on PyPI.

    python3 scripts/libtorch.py [--cpu | --cuda] [--into .libtorch]

--cpu   (default without an NVIDIA GPU) headers and the CPU libraries, 0.5 GB on disk
--cuda  (default with one) also the CUDA libraries that the wheel needs, 5 GB on disk

Standard library and pip only. Wheels are checked against the hashes below by pip; a wheel that is complete
is kept until everything is unpacked, so that a second call after a failure goes on where the first stopped.
The result is renamed into place: a .libtorch that exists is a whole one.
"""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

VERSION = "2.11.0"
WHEELS = {
    ("Linux", "x86_64"): [
        (f"torch=={VERSION}", "7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a", 530_604_548),
        ("nvidia-cuda-cupti==13.0.85", "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8", 10_715_597),
        ("nvidia-cuda-runtime==13.0.96", "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548", 2_243_632),
    ],
    ("Darwin", "arm64"): [
        (f"torch=={VERSION}", "7b6a60d48062809f58595509c524b88e6ddec3ebe25833d6462eeab81e5f2ce4", 80_529_712),
    ],
}
# libtorch_cpu.so asks for these; of the CUDA ones only the two small libraries its profiler is linked to.
CPU_LIBRARIES = ("libtorch_cpu", "libc10.", "libgomp", "libomp", "libcupti.so", "libcudart.so", "libtorch.dylib")


def fail(message: str) -> None:
    sys.exit(f"libtorch: {message}")


def pip(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "pip", *arguments]
    if subprocess.run(command).returncode != 0:
        fail(
            "the download failed (pip's message is above). Check the network and the space on this disk, then run "
            "the same command again: what is complete is kept. With a libtorch 2.11 of your own, set LIBTORCH "
            "to its folder instead, and nothing is downloaded"
        )


def complete(folder: Path, digest: str, size: int) -> Path | None:
    for wheel in folder.glob("*.whl"):
        if wheel.stat().st_size == size:
            hasher = hashlib.sha256()
            with wheel.open("rb") as file:
                while chunk := file.read(1 << 22):
                    hasher.update(chunk)
            if hasher.hexdigest() == digest:
                return wheel
    return None


def download(wheels: list, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(size for _, _, size in wheels)
    print(f"libtorch: downloading {needed / 1e6:.0f} MB from PyPI into {folder}", file=sys.stderr)
    paths = []
    for requirement, digest, size in wheels:
        if complete(folder, digest, size) is None:
            listing = folder / "requirement.txt"
            listing.write_text(f"{requirement} --hash=sha256:{digest}\n")
            pip(["download", "--no-deps", "--only-binary=:all:", "--python-version", "3.11", "--no-cache-dir",
                 "--disable-pip-version-check", "--require-hashes", "-r", str(listing), "-d", str(folder)])
        wheel = complete(folder, digest, size)
        if wheel is None:
            fail(f"{requirement}: the wheel that arrived is not the one expected (sha256 {digest}); delete {folder} and run again")
        paths.append(wheel)
    return paths


def unpack_cpu(wheels: list[Path], target: Path) -> None:
    libraries = target / "lib"
    libraries.mkdir(parents=True)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                file = name.rsplit("/", 1)[-1]
                if name.startswith("torch/include/") and not name.endswith("/"):
                    place = target / name.removeprefix("torch/")
                elif "/lib/" in name and file.startswith(CPU_LIBRARIES):
                    place = libraries / file
                else:
                    continue
                place.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, place.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 22)
    if platform.system() == "Linux":
        # The wheel's libtorch.so is a stub that needs libtorch_cuda.so; torch-sys only wants the name.
        (libraries / "libtorch.so").symlink_to("libtorch_cpu.so")


def install_cuda(target: Path) -> None:
    """The whole wheel with its CUDA dependencies, laid out by pip, seen as a libtorch folder through links."""
    site = target / "site"
    pip(["install", "--only-binary=:all:", "--python-version", "3.11", "--no-cache-dir", "--target", str(site),
         "--disable-pip-version-check", f"torch=={VERSION}"])
    for name in ("lib", "include"):
        (target / name).symlink_to(Path("site") / "torch" / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--cpu", action="store_true")
    kind.add_argument("--cuda", action="store_true")
    parser.add_argument("--into", type=Path, default=Path(__file__).resolve().parent.parent / ".libtorch")
    options = parser.parse_args()
    machine = (platform.system(), platform.machine())
    if machine not in WHEELS:
        fail(f"no libtorch is known for {machine[0]} {machine[1]}; set LIBTORCH to a folder with libtorch {VERSION}")
    cuda = options.cuda or (not options.cpu and shutil.which("nvidia-smi") is not None and machine[0] == "Linux")
    flavour = f"{VERSION}+{'cuda' if cuda else 'cpu'}"
    stamp = options.into / "flavour"
    if stamp.is_file() and stamp.read_text().strip() in (flavour, f"{VERSION}+cuda"):
        return
    part = options.into.with_name(options.into.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        if cuda:
            part.mkdir(parents=True)
            print("libtorch: downloading the CUDA build, about 3 GB", file=sys.stderr)
            install_cuda(part)
        else:
            unpack_cpu(download(WHEELS[machine], options.into.with_name(options.into.name + ".wheels")), part)
        (part / "build-version").write_text(VERSION + "\n")
        (part / "flavour").write_text(flavour + "\n")
        shutil.rmtree(options.into, ignore_errors=True)
        os.replace(part, options.into)
    except OSError as error:
        fail(f"{error}; free some space or change the folder's rights, then run the same command again")
    shutil.rmtree(options.into.with_name(options.into.name + ".wheels"), ignore_errors=True)
    print(f"libtorch: {flavour} is in {options.into}", file=sys.stderr)


if __name__ == "__main__":
    main()
