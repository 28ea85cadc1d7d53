"""What engines offer (checkpoints, samplers, scripts ...) and how a name that a client wrote is found in it.

An A1111 that does not know a checkpoint or sampler silently renders with another one, so every name is looked
up here first, as the engine would (exact), then more kindly (without its hash, without regard to case), and
what is sent is the engine's own spelling.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final, TypeVar

import msgspec

NEAREST_MAX: Final = 3
"""How many names a refusal suggests."""
LISTED_MAX: Final = 20
"""How many it lists when nothing is near."""

_CHECKSUM = re.compile(r"\s*\[[0-9a-fA-F]{8,64}\]\s*$")
"""The end of a title once the file was hashed: `name.safetensors [e1441589a6]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One model file. Its name is the only alias that is the same in every engine: titles gain a hash
    later.
    """

    name: str
    """Relative path with extension, as in its title without the hash."""
    title: str
    aliases: frozenset[str] = frozenset()

    @property
    def stem(self) -> str:
        """What `info.sd_model_name` of an answer says: file name without folder and extension."""
        return stem_of(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """Something known by one name and perhaps others."""

    name: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """All that one engine, or several together, offer. None: the engine does not tell, so nothing is refused
    by it.
    """

    checkpoints: tuple[Checkpoint, ...] | None = None
    samplers: tuple[Named, ...] | None = None
    schedulers: tuple[Named, ...] | None = None
    upscalers: tuple[Named, ...] | None = None
    latent_modes: tuple[Named, ...] | None = None
    vaes: tuple[Named, ...] | None = None
    modules: tuple[Named, ...] | None = None
    """Forge: VAE and text encoders, chosen with the checkpoint."""
    loras: tuple[Named, ...] | None = None
    scripts: tuple[Named, ...] | None = None
    """`txt2img:name` and `img2img:name`, lower case as the engine compares them."""
    endpoints: frozenset[str] | None = None
    options: frozenset[str] | None = None
    """Names of its options: relatives lack some (Forge has no sd_vae), and fail on unknown names."""


Found = TypeVar("Found", Checkpoint, Named)


# --- reading one engine's documents -------------------------------------------------------------------------


class _Model(msgspec.Struct):
    title: str
    model_name: str = ""
    hash: str | None = None
    sha256: str | None = None
    filename: str | None = None


class _Item(msgspec.Struct):
    name: str | None = None
    model_name: str | None = None
    label: str | None = None
    alias: str | None = None
    aliases: list[str] | None = None


class _Scripts(msgspec.Struct):
    txt2img: list[str] = []
    img2img: list[str] = []


class _OpenApi(msgspec.Struct):
    paths: dict[str, dict[str, msgspec.Raw]] = {}


DOCUMENTS: Final[Mapping[str, str]] = {
    "sd-models": "/sdapi/v1/sd-models",
    "samplers": "/sdapi/v1/samplers",
    "schedulers": "/sdapi/v1/schedulers",
    "upscalers": "/sdapi/v1/upscalers",
    "latent-upscale-modes": "/sdapi/v1/latent-upscale-modes",
    "sd-vae": "/sdapi/v1/sd-vae",
    "sd-modules": "/sdapi/v1/sd-modules",
    "loras": "/sdapi/v1/loras",
    "embeddings": "/sdapi/v1/embeddings",
    "hypernetworks": "/sdapi/v1/hypernetworks",
    "prompt-styles": "/sdapi/v1/prompt-styles",
    "face-restorers": "/sdapi/v1/face-restorers",
    "realesrgan-models": "/sdapi/v1/realesrgan-models",
    "scripts": "/sdapi/v1/scripts",
    "script-info": "/sdapi/v1/script-info",
    "options": "/sdapi/v1/options",
    "openapi": "/openapi.json",
}
"""What `describe` fetches of an engine, by the name under which it is kept. Those an engine lacks are left
out."""


def read_catalogue(documents: Mapping[str, bytes]) -> Catalogue:
    """Understand what one engine says it offers. A document that cannot be read counts as not told."""
    return Catalogue(
        checkpoints=_checkpoints(documents.get("sd-models")),
        samplers=_named(documents.get("samplers")),
        schedulers=_named(documents.get("schedulers")),
        upscalers=_named(documents.get("upscalers")),
        latent_modes=_named(documents.get("latent-upscale-modes")),
        vaes=_named(documents.get("sd-vae")),
        modules=_named(documents.get("sd-modules")),
        loras=_named(documents.get("loras")),
        scripts=_scripts(documents.get("scripts")),
        endpoints=_endpoints(documents.get("openapi")),
        options=_option_names(documents.get("options")),
    )


def _checkpoints(document: bytes | None) -> tuple[Checkpoint, ...] | None:
    models = _decode(document, list[_Model])
    if models is None:
        return None
    found: list[Checkpoint] = []
    for model in models:
        name = without_checksum(model.title)
        hashes = {h for h in (model.hash, model.sha256, (model.sha256 or "")[:10]) if h}
        stem = stem_of(name)
        aliases = {
            model.title,
            model.model_name,
            stem,
            *hashes,
            *(f"{n} [{h}]" for h in hashes for n in (name, stem)),
        }
        found.append(Checkpoint(name=name, title=model.title, aliases=frozenset(aliases - {""})))
    return tuple(found)


def _named(document: bytes | None) -> tuple[Named, ...] | None:
    items = _decode(document, list[_Item])
    if items is None:
        return None
    found: list[Named] = []
    for item in items:
        # A scheduler's label is what the engine answers with; a VAE has a model_name only.
        name = item.label or item.name or item.model_name
        if name:
            others = (item.name, item.alias, *(item.aliases or ()))
            found.append(Named(name=name, aliases=tuple(dict.fromkeys(o for o in others if o and o != name))))
    return tuple(found)


def _scripts(document: bytes | None) -> tuple[Named, ...] | None:
    scripts = _decode(document, _Scripts)
    if scripts is None:
        return None
    tabs = (("txt2img", scripts.txt2img), ("img2img", scripts.img2img))
    return tuple(Named(name=f"{tab}:{name.lower()}") for tab, names in tabs for name in names)


def _endpoints(document: bytes | None) -> frozenset[str] | None:
    openapi = _decode(document, _OpenApi)
    if openapi is None:
        return None
    posts = [path for path, methods in openapi.paths.items() if "post" in methods]
    return frozenset(path.removeprefix("/sdapi/v1/").lstrip("/") for path in posts)


def _option_names(document: bytes | None) -> frozenset[str] | None:
    options = _decode(document, dict[str, msgspec.Raw])
    return None if options is None else frozenset(options)


Decoded = TypeVar("Decoded")


def _decode(document: bytes | None, kind: type[Decoded]) -> Decoded | None:
    if document is None:
        return None
    try:
        return msgspec.json.decode(document, type=kind)
    except (msgspec.DecodeError, RecursionError):
        return None


# --- what may be asked of it --------------------------------------------------------------------------------


def offers(catalogue: Catalogue) -> frozenset[str]:
    """Put into needs' words what an engine offers."""
    kinds: tuple[tuple[str, Iterable[Checkpoint | Named] | None], ...] = (
        ("checkpoint", catalogue.checkpoints),
        ("sampler", catalogue.samplers),
        ("scheduler", catalogue.schedulers),
        ("upscaler", catalogue.upscalers),
        ("upscaler", catalogue.latent_modes),
        ("vae", catalogue.vaes),
        ("module", catalogue.modules),
        ("lora", catalogue.loras),
        ("script", catalogue.scripts),
    )
    named = {f"{kind}:{item.name}" for kind, items in kinds for item in items or ()}
    endpoints = {f"endpoint:{name}" for name in catalogue.endpoints or DEFAULT_ENDPOINTS}
    return frozenset(named | endpoints | {f"option:{name}" for name in catalogue.options or ()})


DEFAULT_ENDPOINTS: Final = frozenset(
    {"txt2img", "img2img", "extra-single-image", "extra-batch-images", "interrogate"}
)
"""What every engine of this kind has, for one that hides /openapi.json."""


def merged(catalogues: Sequence[Catalogue]) -> Catalogue:
    """Unite what several engines offer, in the order of the engines: clients pick by position in a list
    (webuiapi).
    """
    endpoints = [c.endpoints for c in catalogues if c.endpoints is not None]
    options = [c.options for c in catalogues if c.options is not None]
    return Catalogue(
        checkpoints=_merged_checkpoints([c.checkpoints for c in catalogues]),
        samplers=_union([c.samplers for c in catalogues]),
        schedulers=_union([c.schedulers for c in catalogues]),
        upscalers=_union([c.upscalers for c in catalogues]),
        latent_modes=_union([c.latent_modes for c in catalogues]),
        vaes=_union([c.vaes for c in catalogues]),
        modules=_union([c.modules for c in catalogues]),
        loras=_union([c.loras for c in catalogues]),
        scripts=_union([c.scripts for c in catalogues]),
        endpoints=frozenset[str]().union(*endpoints) if endpoints else None,
        options=frozenset[str]().union(*options) if options else None,
    )


def _union(lists: Sequence[tuple[Named, ...] | None]) -> tuple[Named, ...] | None:
    told = [items for items in lists if items is not None]
    names: dict[str, Named] = {}
    for item in (item for items in told for item in items):
        known = names.get(item.name)
        aliases = item.aliases if known is None else tuple(dict.fromkeys((*known.aliases, *item.aliases)))
        names[item.name] = Named(name=item.name, aliases=aliases)
    return tuple(names.values()) if told else None


def _merged_checkpoints(lists: Sequence[tuple[Checkpoint, ...] | None]) -> tuple[Checkpoint, ...] | None:
    told = [items for items in lists if items is not None]
    names: dict[str, Checkpoint] = {}
    for item in (item for items in told for item in items):
        known = names.get(item.name)
        # The longer title is the hashed one; it is what an engine would show by now.
        title = item.title if known is None else max(known.title, item.title, key=len)
        aliases = item.aliases if known is None else known.aliases | item.aliases
        names[item.name] = Checkpoint(name=item.name, title=title, aliases=aliases)
    return tuple(names.values()) if told else None


# --- lists for clients --------------------------------------------------------------------------------------


class _Identity(msgspec.Struct):
    title: str | None = None
    name: str | None = None
    model_name: str | None = None
    is_img2img: bool | None = None


def merged_list(documents: Sequence[bytes]) -> bytes:
    """Unite JSON lists of several engines item by item, untouched and in stable order; the first of a name
    counts.
    """
    seen: set[tuple[str, bool | None]] = set()
    items: list[msgspec.Raw] = []
    for document in documents:
        for item in _decode(document, list[msgspec.Raw]) or ():
            identity = _decode(bytes(item), _Identity)
            if identity is None:
                continue
            name = without_checksum(identity.title or "") or identity.name or identity.model_name or ""
            if (name, identity.is_img2img) not in seen:
                seen.add((name, identity.is_img2img))
                items.append(item)
    return msgspec.json.encode(items)


def merged_maps(documents: Sequence[bytes]) -> bytes:
    """Unite JSON objects of lists or objects one level deep: `scripts` and `embeddings`."""
    result: dict[str, list[object] | dict[str, object]] = {}
    for document in documents:
        for key, value in (_decode(document, dict[str, list[object] | dict[str, object]]) or {}).items():
            known = result.get(key)
            if isinstance(known, list) and isinstance(value, list):
                known.extend(item for item in value if item not in known)
            elif isinstance(known, dict) and isinstance(value, dict):
                result[key] = value | known
            elif known is None:
                result[key] = value
    return msgspec.json.encode(result)


MAP_DOCUMENTS: Final = frozenset({"scripts", "embeddings"})


def merged_document(name: str, documents: Sequence[bytes]) -> bytes:
    """Unite one document of several engines; `name` as in DOCUMENTS."""
    return merged_maps(documents) if name in MAP_DOCUMENTS else merged_list(documents)


# --- finding names ------------------------------------------------------------------------------------------


def find(items: tuple[Found, ...], wanted: str) -> Found | None:
    """Find by name, then by alias, then without regard to case; two that differ in case only are not guessed
    between.
    """
    for item in items:
        if item.name == wanted:
            return item
    for item in items:
        if wanted in item.aliases:
            return item
    folded = wanted.casefold()
    kind = [i for i in items if i.name.casefold() == folded or any(a.casefold() == folded for a in i.aliases)]
    return kind[0] if len(kind) == 1 else None


def find_checkpoint(checkpoints: tuple[Checkpoint, ...], wanted: str) -> Checkpoint | None:
    """Find a checkpoint as the engine would, or with a hash it does not have (yet), or by the end of its
    path.
    """
    found = find(checkpoints, wanted) or find(checkpoints, without_checksum(wanted))
    if found is not None:
        return found
    tail = file_of(without_checksum(wanted))
    same = [c for c in checkpoints if file_of(c.name) == tail]
    return same[0] if len(same) == 1 else None


def find_checkpoint_loosely(checkpoints: tuple[Checkpoint, ...], wanted: str) -> Checkpoint | None:
    """Find what POST /options would load: any part of a title will do there, the shortest title first."""
    found = find_checkpoint(checkpoints, wanted)
    if found is not None or not wanted:
        return found
    containing = [c for c in checkpoints if wanted in c.title]
    return min(containing, key=lambda c: len(c.title)) if containing else None


def find_by_stem(checkpoints: tuple[Checkpoint, ...] | None, stem: str) -> Checkpoint | None:
    """Find the checkpoint that an answer names as `sd_model_name`; None when it could be two."""
    # A stem has no extension any more, but may hold dots: only folders are cut off.
    same = [c for c in checkpoints or () if c.stem == file_of(stem)]
    return same[0] if len(same) == 1 else None


def nearest(names: Iterable[str], wanted: str) -> tuple[str, ...]:
    """Suggest names like the one that was not found, the most alike first.

    People leave out folder, extension and hash, which are much of a title: without them it is compared too.
    """
    shown: dict[str, str] = {}
    for name in names:
        bare = without_checksum(name)
        for form in (name, bare, file_of(bare), stem_of(bare)):
            shown.setdefault(form.casefold(), name)
    # A name's forms are alike, so there may be four of each.
    close = get_close_matches(wanted.casefold(), list(shown), n=4 * NEAREST_MAX, cutoff=0.4)
    return tuple(dict.fromkeys(shown[form] for form in close))[:NEAREST_MAX]


def hinted(names: Iterable[str], wanted: str) -> str | None:
    """Say in a refusal what would have been known: the nearest names, else some of all."""
    listed = list(names)
    near = nearest(listed, wanted)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"there are: {', '.join(listed[:LISTED_MAX])}" if listed else None


def without_checksum(title: str) -> str:
    """Strip the hash at a title's end."""
    return _CHECKSUM.sub("", title)


def stem_of(name: str) -> str:
    """File name without folders and extension."""
    last = file_of(name)
    return last.rsplit(".", 1)[0] if "." in last else last


def file_of(name: str) -> str:
    """File name without folders, whichever way their slashes lean."""
    return name.replace("\\", "/").rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerChoice:
    """A sampler as it will be sent; `scheduler` is set when the name carried it (`DPM++ 2M Karras`)."""

    sampler: str
    scheduler: str | None = None


def find_sampler(catalogue: Catalogue, wanted: str) -> SamplerChoice | None:
    """Find a sampler; older names end in their scheduler's, which newer engines cut off and apply."""
    samplers = catalogue.samplers or ()
    whole = find(samplers, wanted)
    if whole is not None:
        return SamplerChoice(sampler=whole.name)
    for scheduler in catalogue.schedulers or ():
        for name in (scheduler.name, *scheduler.aliases):
            if wanted.casefold().endswith(" " + name.casefold()):
                cut = find(samplers, wanted[: -len(name) - 1])
                if cut is not None:
                    return SamplerChoice(sampler=cut.name, scheduler=scheduler.name)
    return None


def digest(documents: Mapping[str, bytes]) -> str:
    """Digest of what an engine offers; `options` are left out, since every job may change them."""
    hashed = hashlib.blake2b(digest_size=16)
    for name in sorted(documents):
        if name != "options":
            hashed.update(name.encode() + b"\0" + documents[name] + b"\0")
    return hashed.hexdigest()
