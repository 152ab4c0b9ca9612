"""The bill of materials (SBOM) of a package: CycloneDX 1.6 in JSON, the same bytes for the same package.

Source: cyclonedx.org, "CycloneDX v1.6 JSON Reference"; of package URLs: package-url/purl-spec. There is no time of day
in it, and its serial number follows from its content.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from urllib.parse import quote

import edgephi
from edgephi.bundle import FileEntry, Manifest
from edgephi.packaging.licences import Licence
from edgephi.packaging.requirements import OWN, Wheel

MODEL, APP = "model", "app"
Component = dict[str, object]


def bill_of_materials(
    name: str,
    manifest: Manifest,
    manifest_sha256: str,
    model_licence: str | None,
    wheels: Sequence[tuple[Wheel, Licence]],
    files: Mapping[str, str],
) -> str:
    """The text of the bill.

    Args:
        name: of the package.
        manifest: of the bundle that is in it.
        manifest_sha256: of its edgephi.json, which has the hashes of all other files.
        model_licence: expression of SPDX; None: not known.
        files: SHA-256 of wheel files, by name of the wheel; empty: they are not in the package.
    """
    roots = next(wheel for wheel, _ in wheels if wheel.name == OWN)
    bill: dict[str, object] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "lifecycles": [{"phase": "build"}],
            "tools": {"components": [{"type": "application", "name": OWN, "version": edgephi.__version__}]},
            "component": {"type": "application", "bom-ref": APP, "name": name},
        },
        "components": [
            _model(manifest, manifest_sha256, model_licence),
            *(_wheel(wheel, licence, files.get(wheel.name)) for wheel, licence in wheels),
        ],
        "dependencies": [
            {"ref": APP, "dependsOn": [MODEL, purl(roots)]},
            {"ref": MODEL},
            *({"ref": purl(wheel)} | _depends(wheel, wheels) for wheel, _ in wheels),
        ],
    }
    content = hashlib.sha256(json.dumps(bill, sort_keys=True).encode()).hexdigest()
    bill["serialNumber"] = f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, content)}"
    return json.dumps(bill, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def purl(wheel: Wheel) -> str:
    """The package URL of a wheel."""
    return f"pkg:pypi/{wheel.name}@{quote(wheel.version, safe='.')}"


def _depends(wheel: Wheel, wheels: Sequence[tuple[Wheel, Licence]]) -> dict[str, object]:
    required = [purl(other) for other, _ in wheels if other.name in wheel.requires]
    return {"dependsOn": required} if required else {}


def _wheel(wheel: Wheel, licence: Licence, sha256: str | None) -> Component:
    return {
        "type": "library",
        "bom-ref": purl(wheel),
        "name": wheel.name,
        "version": wheel.version,
        "purl": purl(wheel),
        **({"hashes": _hashes(sha256)} if sha256 else {}),
        **_licences(licence.expression, licence.name),
    }


def _licences(expression: str | None, name: str | None = None) -> Component:
    if expression is not None:
        return {"licenses": [{"expression": expression, "acknowledgement": "declared"}]}
    if name is not None:
        return {"licenses": [{"license": {"name": name, "acknowledgement": "declared"}}]}
    return {}


def _model(manifest: Manifest, manifest_sha256: str, licence: str | None) -> Component:
    """The bundle; what it was made from is its ancestor."""
    source, recipe = manifest.source, manifest.recipe
    facts = {
        "precision": recipe.precision,
        "parameters": str(manifest.model.parameters),
        "context_length": str(manifest.model.context_length),
        "devices": ",".join([*(graph.device for graph in manifest.graphs), *(["qnn"] if manifest.npu else [])]),
    }
    return {
        "type": "machine-learning-model",
        "bom-ref": MODEL,
        "name": source.name,
        "version": source.revision or manifest_sha256,
        "description": "Bundle of edgephi; the hash is that of its edgephi.json, which lists the others",
        "hashes": _hashes(manifest_sha256),
        **_licences(licence),
        "modelCard": {"modelParameters": {"task": "text-generation", "architectureFamily": manifest.model.family}},
        "components": [_file(entry, MODEL) for entry in manifest.files],
        "pedigree": {"ancestors": [_source(manifest)], "notes": f"exported to {recipe.precision} by edgephi"},
        "properties": [{"name": f"edgephi:{key}", "value": value} for key, value in facts.items()],
    }


def _source(manifest: Manifest) -> Component:
    source = manifest.source
    found: Component = {"type": "machine-learning-model", "name": source.name}
    if source.revision is not None:
        found["version"] = source.revision
    if source.kind == "hub":
        revision = f"@{quote(source.revision, safe='')}" if source.revision else ""
        found["purl"] = f"pkg:huggingface/{quote(source.name, safe='/.')}{revision}"
    return found | {"components": [_file(entry, "source") for entry in source.files]}


def _file(entry: FileEntry, owner: str) -> Component:
    return {"type": "file", "bom-ref": f"{owner}/{entry.path}", "name": entry.path, "hashes": _hashes(entry.sha256)}


def _hashes(sha256: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": sha256}]
