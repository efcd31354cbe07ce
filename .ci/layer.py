"""Build the AWS Lambda layer: the package under python/, which Lambda puts on sys.path.

The same sources give the same bytes, where Python has the same zlib: names are sorted, and time stamps and permissions
are fixed.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYER = ROOT / "dist" / "zamp-sdk-layer.zip"

# The earliest time a ZIP file can hold.
EPOCH = (1980, 1, 1, 0, 0, 0)
UNIX = 3
READABLE_FILE = 0o100644 << 16


def main() -> None:
    """Write dist/zamp-sdk-layer.zip."""
    package = ROOT / "zamp_sdk"
    sources = {path.relative_to(ROOT).as_posix(): path for path in [*package.rglob("*.py"), package / "py.typed"]}
    sources["zamp_sdk/LICENSE"] = ROOT / "LICENSE"
    LAYER.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(LAYER, "w") as layer:
        for name, path in sorted(sources.items()):
            entry = zipfile.ZipInfo(f"python/{name}", EPOCH)
            entry.create_system = UNIX
            entry.external_attr = READABLE_FILE
            entry.compress_type = zipfile.ZIP_DEFLATED
            layer.writestr(entry, path.read_bytes(), compresslevel=9)
    print(f"{LAYER.relative_to(ROOT)}: {LAYER.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
