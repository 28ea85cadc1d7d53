"""Writes what documents say of settings and constants from the code itself, so that they cannot differ.

    python scripts/make_reference.py [--check]      --check writes nothing and ends with 1 when a file differs

Made whole: docs/configuration.md and gpulane.example.yaml, from config/settings.py. Made in part, between two
marks: the constants in docs/scheduling.md, from core/policy.py. Reads source text, imports nothing of it.
"""

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = Path("src/gpulane/config/settings.py")
POLICY = Path("src/gpulane/core/policy.py")
CONFIGURATION = Path("docs/configuration.md")
EXAMPLE = Path("gpulane.example.yaml")
SCHEDULING = Path("docs/scheduling.md")
BEGIN, END = "<!-- made from core/policy.py -->", "<!-- end -->"
COMMENT_WIDTH = 100
SECTIONS = {
    "Settings": ("Top level", ""),
    "GpuSettings": ("One GPU: `gpus.NAME`", "gpus.NAME"),
    "EngineSettings": ("One engine: an entry of `gpus.NAME.engines`", "gpus.NAME.engines[]"),
    "KeySettings": ("One key: an entry of `keys`", "keys[]"),
    "LimitSettings": ("`limits`", "limits"),
    "RetentionSettings": ("`retention`", "retention"),
    "HoldSettings": ("`hold`", "hold"),
    "ProbeSettings": ("`probe`", "probe"),
    "HandoffSettings": ("`handoff`", "handoff"),
    "HealthSettings": ("`health`", "health"),
    "RetrySettings": ("`retry`", "retry"),
    "SchedulingSettings": ("`scheduling`", "scheduling"),
    "LogSettings": ("`log`", "log"),
}
OVERRIDDEN = {
    "slack_loads": "scheduling.slack_loads",
    "slack_cap_seconds_per_gpu": "scheduling.slack_cap_seconds_per_gpu",
    "load_seconds_unknown": "scheduling.load_seconds_unknown",
    "service_seconds_unknown": "scheduling.service_seconds_unknown",
    "retry_seconds_base": "retry.rest_seconds",
    "retry_seconds_max": "retry.rest_seconds_max",
    "handoff_margin_bytes": "handoff.margin_gib",
    "skip_leaking": "handoff.when_leaking",
}
"""Constants of the policy that the settings replace (`_policy` in service.py)."""

SAID_OTHERWISE = {"handoff_margin_bytes", "skip_leaking"}
"""Those of them that the setting says in another unit or word: the constant's own value is shown."""

UNSAID = {
    "GpuSettings.engines": "The engines that share the card, see the next table.",
    "KeySettings.account": "Whom work is charged to, and whose jobs, files and options they are.",
    "KeySettings.role": "What the key may do, see [roles](api.md#who-asks).",
    "RetentionSettings.ended_days": "Ended jobs are forgotten after so long.",
    "RetentionSettings.ended_jobs_max": "Ended jobs that are kept; the oldest are forgotten first.",
    "ProbeSettings.interval_seconds": "How often an engine is asked whether it lives.",
    "RetrySettings.attempts_max": "Attempts of one job, unless it asks for another number.",
    "RetrySettings.rest_seconds_max": "The longest such rest.",
    "SchedulingSettings.slack_loads": "Rule 1: how many model loads ahead a job of a loaded model may go.",
    "SchedulingSettings.slack_cap_seconds_per_gpu": "Rule 1: the most slack, per usable GPU.",
    "SchedulingSettings.load_seconds_unknown": "Load time of a model that was never measured.",
    "SchedulingSettings.service_seconds_unknown": "Service time of a job of a kind that was never measured.",
    "HealthSettings.pause_seconds_max": "The longest such pause.",
    "LogSettings.format": "Lines for people, or one JSON object a line.",
    "LogSettings.level": "What is less than this is not logged.",
}
"""Settings whose name says enough in the code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One setting."""

    name: str
    type: str
    default: str | None
    """As YAML; None: must be given."""
    section: str | None
    """The class whose fields stand below this one."""
    about: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One class of settings."""

    name: str
    about: str
    fields: tuple[Field, ...]


def main() -> int:
    made = documents(ROOT)
    differing = [path for path, text in made.items() if read(ROOT / path) != text]
    if "--check" in sys.argv[1:]:
        print("\n".join(f"{path} differs: run python scripts/make_reference.py" for path in differing))
        return int(bool(differing))
    for path in differing:
        (ROOT / path).write_text(made[path], encoding="utf-8")
        print(f"wrote {path}")
    return 0


def documents(root: Path) -> dict[Path, str]:
    """Returns the text of each document that is made here."""
    sections = settings_of(root)
    return {
        CONFIGURATION: configuration(sections),
        EXAMPLE: example(sections),
        SCHEDULING: scheduling(read(root / SCHEDULING), policy_of(root), sections),
    }


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


# ---- the source, read as text


def settings_of(root: Path) -> dict[str, Section]:
    aliases: dict[str, str] = {}
    sections: dict[str, Section] = {}
    for node in ast.parse(read(root / SETTINGS)).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                aliases[name] = ast.unparse(value)
            case ast.ClassDef(name=name) if not name.startswith("_"):
                sections[name] = Section(
                    name=name, about=prose(ast.get_docstring(node) or ""), fields=fields_of(node, aliases)
                )
            case _:
                pass
    assert set(SECTIONS) == set(sections), "a new class of settings needs a heading in SECTIONS"
    return sections


def policy_of(root: Path) -> tuple[Field, ...]:
    classes = [node for node in ast.parse(read(root / POLICY)).body if isinstance(node, ast.ClassDef)]
    (policy,) = classes
    return fields_of(policy, {})


def fields_of(node: ast.ClassDef, aliases: dict[str, str]) -> tuple[Field, ...]:
    """Returns the fields of a class; the string below a field is its documentation."""
    found: list[Field] = []
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            written = ast.unparse(statement.annotation)
            section = next((name for name in SECTIONS if re.search(rf"\b{name}\b", written)), None)
            found.append(
                Field(
                    name=statement.target.id,
                    type=type_in_words(aliases.get(written.removesuffix(" | None"), written)),
                    default=None if statement.value is None else as_yaml(statement.value),
                    section=section,
                    about=below(following) or UNSAID.get(f"{node.name}.{statement.target.id}", ""),
                )
            )
    return tuple(found)


def below(statement: ast.stmt | None) -> str:
    match statement:
        case ast.Expr(value=ast.Constant(value=str(text))):
            return prose(text)
        case _:
            return ""


def prose(text: str) -> str:
    return " ".join(text.split())


def as_yaml(value: ast.expr) -> str:
    match value:
        case ast.Constant(value=None):
            return "null"
        case ast.Constant(value=bool(truth)):
            return str(truth).lower()
        case ast.Constant(value=float(number)) if number.is_integer():
            return f"{number:.0f}"
        case ast.Constant(value=str(text)):
            return text or '""'
        case ast.Constant(value=number):
            return str(number)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):  # 512 * 1024
            return str(int(as_yaml(left)) * int(as_yaml(right)))
        case ast.Tuple():
            return "[]"
        case ast.Dict():
            return "{}"
        case ast.Call():  # a section with its own defaults
            return "{}"
        case _:
            raise AssertionError(f"no words for the default {ast.unparse(value)}")


def type_in_words(written: str) -> str:
    choices = written.removesuffix(" | None")
    if choices.startswith("Literal["):
        names: list[str] = list(ast.literal_eval(f"[{choices.removeprefix('Literal[').removesuffix(']')}]"))
        return " \\| ".join(f"`{name}`" for name in names)
    words = {
        "str": "text",
        "float": "number",
        "Seconds": "number",
        "int": "whole number",
        "bool": "true or false",
        "tuple[str, ...]": "list of text",
        "tuple[tuple[str, ...], ...]": "list of lists of text",
        "dict[str, str]": "text by name",
    }
    if choices in words:
        return words[choices]
    if "EngineSettings" in written:
        return "list of ports, addresses or sections"
    if written.startswith("tuple["):
        return "list of sections"
    return "sections by name" if written.startswith("dict[") else "section"


# ---- docs/configuration.md


def configuration(sections: dict[str, Section]) -> str:
    parts = [CONFIGURATION_HEAD]
    for name, (title, _) in SECTIONS.items():
        section = sections[name]
        parts.append(f"## {title}\n\n{section.about}\n\n{table(section)}")
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def table(section: Section) -> str:
    lines = ["| setting | type | default | what it does |", "|---|---|---|---|"]
    for field in section.fields:
        default = "required" if field.default is None else shown_default(field)
        about = field.about or (f"See [below](#{anchor(field.section)})." if field.section else "")
        lines.append(f"| `{field.name}` | {field.type} | {default} | {about.replace('|', '&#124;')} |")
    return "\n".join(lines)


def shown_default(field: Field) -> str:
    is_section = field.default == "{}" and field.section is not None
    return "see there" if is_section and field.name != "gpus" else f"`{field.default}`"


def anchor(section: str | None) -> str:
    """Returns what GitHub makes of a heading."""
    title, _ = SECTIONS[section or "Settings"]
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -_")
    return kept.replace(" ", "-")


CONFIGURATION_HEAD = """
# Configuration

<!-- Made by scripts/make_reference.py from src/gpulane/config/settings.py; change that file instead. -->

Settings are one YAML file, given with `-c FILE` or the environment variable `GPULANE_CONFIG`. What stands on
the command line (`GPU ...`, `--listen`, `--data`, `--store`, `--allow-anonymous`) lies over the file. Only
`gpus` must be given, in one of the two. [gpulane.example.yaml](../gpulane.example.yaml) has every setting
with its default.

```yaml
gpus:
  gpu0: {engines: [7860, 8188]}
  gpu1: {engines: ["a1111:7861", "comfyui:8189"], vram_gib: 24, labels: [big]}
```

An engine is a port of this machine, `HOST:PORT`, a URL, or a section with `url`. The short forms take
`comfyui:`, `a1111:` or `http:` in front where the kind is not to be found by asking. An engine belongs to one
GPU, once. Unknown settings are refused with the nearest known name; `gpulane check -c FILE` validates a file
and asks every engine that it names. Settings are read at the start only.

`redis://` is understood and refused: a queue shared by many machines comes with a later version.

Units are in the names: `_seconds`, `_mib` (1,048,576 bytes), `_gib`, `_days`; `_max` is the most that is
allowed.
"""


# ---- gpulane.example.yaml


def example(sections: dict[str, Section]) -> str:
    lines = EXAMPLE_HEAD.strip("\n").splitlines()
    for field in sections["Settings"].fields:
        if field.name == "gpus":
            continue
        lines.append("")
        if field.section is None or field.name == "keys":
            lines += comment(field.about or section_about(sections, field), "")
            lines.append(f"{field.name}: {field.default}")
            lines += EXAMPLE_KEYS if field.name == "keys" else []
            continue
        section = sections[field.section]
        lines += [*comment(section.about, ""), f"{field.name}:"]
        for inner in section.fields:
            lines += comment(inner.about, "  ")
            lines.append(f"  {inner.name}: {inner.default}")
    return "\n".join(lines) + "\n"


def section_about(sections: dict[str, Section], field: Field) -> str:
    return sections[field.section].about if field.section else ""


def comment(text: str, indent: str) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + len(word) < COMMENT_WIDTH:
            lines[-1] += f" {word}"
        else:
            lines.append(f"{indent}# {word}")
    return lines


EXAMPLE_KEYS = [
    "# keys:",
    "#   - {account: ann, sha256: 64 hex digits, role: user, weight: 1}",
]
EXAMPLE_HEAD = """
# Every setting of gpulane with its default. Made by scripts/make_reference.py from config/settings.py.
# Copy what you change; only `gpus` is required. Check a file with: gpulane check -c FILE

# The GPUs, by names of your choice; engines of one GPU share that card and run one job at a time.
gpus:
  gpu0:
    engines: [7860, 8188]
  gpu1:
    engines:
      - "a1111:127.0.0.1:7861"
      - {url: "http://127.0.0.1:8189", service: comfyui}
    # Memory of the card, where no driver tells.
    vram_gib: 24
    # Words that jobs can ask for.
    labels: [big]
    # Of two idle GPUs that hold a model the faster one is taken.
    speed: 1
  # A GPU for a program of any other kind, here an LLM server at /svc/llm/.
  # gpu2:
  #   engines:
  #     - {url: "http://127.0.0.1:8000", service: http, name: llm, jobs: ["POST /v1/chat/completions"]}
"""


# ---- the constants in docs/scheduling.md


def scheduling(text: str, policy: tuple[Field, ...], sections: dict[str, Section]) -> str:
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    assert (begin, end) == (BEGIN, END), f"{SCHEDULING} needs the marks {BEGIN} and {END}"
    rows = ["| constant | value | setting | why |", "|---|---|---|---|"]
    for field in policy:
        setting = OVERRIDDEN.get(field.name)
        value = (
            field.default
            if setting is None or field.name in SAID_OTHERWISE
            else setting_default(setting, sections)
        )
        shown = f"`{setting}`" if setting else ""
        rows.append(f"| `{field.name}` | {value} | {shown} | {field.about.replace('|', '&#124;')} |")
    return f"{head}{BEGIN}\n" + "\n".join(rows) + f"\n{END}{tail}"


def setting_default(setting: str, sections: dict[str, Section]) -> str | None:
    place, _, name = setting.rpartition(".")
    (section,) = [sections[key] for key, (_, path) in SECTIONS.items() if path == place]
    (field,) = [field for field in section.fields if field.name == name]
    return field.default


if __name__ == "__main__":
    sys.exit(main())
