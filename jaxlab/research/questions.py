"""Questions that the rule policy can read.

Forms, in words or by options; [..] may be left out:

    does A match|beat|improve on|differ from B?      compare A and B [and C]
    sweep FIELD over 1e-4, 3e-4, 1e-3 of A            ablate FIELD=VALUE, ... of A
    scale FIELD over 64, 128, 256 of A
    ... [at|with FIELD=VALUE, ...] [at equal tokens] [on CORPUS] [by METRIC] [within D]

A and B are configs: configs/a.py, or a word that is in the name of just one config of
the checkout. FIELD=VALUE after a config is for it alone, elsewhere for all. Options
say the same: compare, sweep, ablate, scale, set, metric, direction, min_effect. What
cannot be read is answered with what is missing, never with a guess.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlab.research import plans
from jaxlab.research.tool import Context, tool
from jaxlab.research.types import Arm, NeedsHuman, ToolError

FORMS = (__doc__ or "").split("\n\n")[2]
LOWER = re.compile(r"loss|error|perplexity|ppl|nll|seconds|time/(step|data|compile)")
HIGHER = re.compile(r"accuracy|reward|return|success|score|mfu|tokens_per_second")
SHORT = {"H": "inner_steps"}
_VALUE = r"[-+]?[\w.]+(?:[-+]\d+)?"
_SETTING = re.compile(rf"\b([A-Za-z_][\w.]*)\s*=\s*({_VALUE})")


class Missing(ToolError):
    """A question that cannot be read; the text says what is missing."""


# --------------------------------------------------------------------- read


@tool("pure")
def read_question(context: Context) -> dict[str, Any]:
    """Reads the question and options as an experiment, or says what is missing."""
    try:
        made = read(context)
    except ToolError as error:
        if str(context.options.get("model", "rule")) == "rule":
            raise NeedsHuman(
                f"{error}\nForms that the rule policy can read:\n{FORMS}"
            ) from None
        return {"ok": False, "missing": str(error), "forms": FORMS}
    return {"ok": True, "kind": made["kind"], "arms": [a["name"] for a in made["arms"]]}


def read(context: Context) -> dict[str, Any]:
    """The experiment that is asked for: kind, arms, reference, metric, direction, ...

    Raises:
        ToolError: it cannot be read; what is missing.
    """
    options = context.options
    text = " ".join(str(context.events()[0].data["question"]).split())
    asked = _asked(text, options)
    common = dict(options.get("set", {})) | asked["common"]
    metric = str(options.get("metric") or asked["metric"] or "eval/loss")
    arms, factors = _arms(asked, common, context)
    kind = asked["kind"]
    return {
        "kind": kind,
        "arms": [
            {"name": a.name, "config": a.config, "overrides": a.overrides} for a in arms
        ],
        "reference": {"sweep": None, "scale": None}.get(kind, _reference(kind, arms)),
        "factors": factors,
        "metric": metric,
        "direction": _direction(metric, options),
        "min_effect": options.get("min_effect", asked["min_effect"]),
        "alpha": float(options.get("alpha", 0.05)),
    }


def _asked(text: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Kind, configs as words, and settings, from options or else from the words."""
    found = {
        "common": {},
        "min_effect": None,
        "metric": None,
        "field": None,
        "values": [],
    }
    for name in ("sweep", "scale", "ablate"):
        if given := options.get(name):
            given = [given] if isinstance(given, str) else list(given)
            of = options.get("compare") or options.get("config")
            if not of:
                raise Missing(f"--{name} needs the config to vary: --compare CONFIG")
            configs = [of] if isinstance(of, str) else list(of)
            if name == "ablate":
                settings = dict(pairs(", ".join(given)))
                return found | {
                    "kind": name,
                    "configs": configs[:1],
                    "values": settings,
                }
            if len(given) > 1:
                raise Missing(
                    f"one field at a time: {name} {given[0]!r} or {given[1]!r}"
                )
            field, _, values = given[0].partition("=")
            values = [_literal(v) for v in values.split(",") if v.strip()]
            return found | {
                "kind": name,
                "configs": configs[:1],
                "field": field.strip(),
                "values": values,
            }
    if given := options.get("compare"):
        return found | {
            "kind": "compare",
            "configs": list(given),
            "own": [{}] * len(given),
        }
    return found | _words(text)


def _words(text: str) -> dict[str, Any]:
    """The question in words."""
    found: dict[str, Any] = {}
    text = text.strip().rstrip("?.! ")
    if match := re.search(r"\bwithin\s+([\d.]+(?:e-?\d+)?)\b", text):
        found["min_effect"] = float(match[1])
        text = text.replace(match[0], " ")
    if match := re.search(r"\b(?:by|judged by|in)\s+([a-z]+/[a-z_]+)", text):
        found["metric"] = match[1]
        text = text.replace(match[0], " ")
    common: dict[str, Any] = {}
    if match := re.search(r"\bon\s+(stdlib|pydocs|linuxdocs)\b", text):
        common["data.corpus"] = match[1]
        text = text.replace(match[0], " ")
    text = re.sub(r"\bat\s+(equal|the same)\s+(tokens|steps|compute)\b", " ", text)
    text = " ".join(text.split())
    own = (
        r"((?:\s+(?:at|with)\s+[\w.]+\s*=\s*[^\s,]+(?:\s*,\s*[\w.]+\s*=\s*[^\s,]+)*)?)"
    )
    name = r"([\w./-]+)"
    pair = re.match(
        rf"(?:does|do|is|can|will|could)\s+{name}{own}\s+(?:match(?:es)?|beat|outperform"
        rf"|equal|improve (?:on|over)|differ from|do (?:better|worse) than"
        rf"|(?:better|worse|as good|different|lower|higher)\s+(?:than|as|from)"
        rf"|train (?:better|worse) than|vs\.?)\s+{name}{own}$",
        text,
        re.IGNORECASE,
    )
    if pair:
        a, settings_a, b, settings_b = pair.groups()
        return found | {
            "kind": "compare",
            "configs": [a, b],
            "own": [dict(pairs(settings_a)), dict(pairs(settings_b))],
            "common": common,
        }
    if match := re.match(rf"compare\s+(.+?){own}$", text, re.IGNORECASE):
        names = re.split(
            r"\s*,\s*|\s+(?:and|with|to|vs\.?|versus|against)\s+", match[1]
        )
        names = [n for n in names if n and "=" not in n]
        common |= dict(pairs(match[2]))
        own_of: list[dict[str, Any]] = [{} for _ in names]
        return found | {
            "kind": "compare",
            "configs": names,
            "own": own_of,
            "common": common,
        }
    match = re.match(
        rf"(sweep|scale)\s+([\w.]+)\s+(?:over|in|at|=)\s*(.+?)\s+(?:of|for)\s+{name}{own}$",
        text,
        re.IGNORECASE,
    )
    if match:
        kind, field, values, config, settings = match.groups()
        listed = [_literal(v) for v in re.split(r"\s*,\s*|\s+and\s+", values) if v]
        return found | {
            "kind": kind.lower(),
            "configs": [config],
            "field": field,
            "values": listed,
            "common": common | dict(pairs(settings)),
        }
    if match := re.match(
        rf"ablate\s+(.+?)\s+(?:of|in)\s+{name}{own}$", text, re.IGNORECASE
    ):
        return found | {
            "kind": "ablate",
            "configs": [match[2]],
            "values": dict(pairs(match[1])),
            "common": common | dict(pairs(match[3])),
        }
    raise Missing(
        f"the rule policy cannot read {text[:120]!r}: no comparison, sweep, ablation "
        "or scaling in a form that it knows; write one, or give --compare CONFIG "
        "CONFIG or --sweep FIELD=VALUE,VALUE"
    )


def pairs(text: str) -> list[tuple[str, Any]]:
    """The settings in a text: (name, value) of each NAME=VALUE."""
    return [(name, _literal(value)) for name, value in _SETTING.findall(text or "")]


def _literal(text: str) -> Any:
    text = text.strip()
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def _direction(metric: str, options: Mapping[str, Any]) -> str:
    if given := options.get("direction"):
        if given not in ("lower", "higher"):
            raise Missing(f"direction {given!r} is neither lower nor higher")
        return str(given)
    for name, pattern in (("lower", LOWER), ("higher", HIGHER)):
        if pattern.search(metric):
            return name
    raise Missing(f"is a lower or a higher {metric} better? --option direction=lower")


def _reference(kind: str, arms: list[Arm]) -> str:
    return arms[-1].name if kind == "compare" else arms[0].name


# --------------------------------------------------------------------- arms


def _arms(
    asked: Mapping[str, Any], common: dict[str, Any], context: Context
) -> tuple[list[Arm], dict[str, Any]]:
    """The arms, their fields by full name, and the value of the varied field by arm."""
    configs = [config_of(word, context) for word in asked["configs"]]
    kind, factors = asked["kind"], {}
    fields = {c: fields_of(c, context) for c in configs}
    if kind == "compare":
        if len(configs) < 2:
            raise Missing("what is it to be compared with? Name a second config")
        made = []
        for config, own in zip(configs, asked["own"], strict=True):
            own = {field_of(k, fields[config], config): v for k, v in own.items()}
            shared = {field_of(k, fields[config], config): v for k, v in common.items()}
            made.append(Arm(_name(config, own), config, shared | own))
        return _distinct(made), {}
    config = configs[0]
    shared = {field_of(k, fields[config], config): v for k, v in common.items()}
    if kind == "ablate":
        if not asked["values"]:
            raise Missing("what is to be taken out? ablate FIELD=VALUE, ... of CONFIG")
        made = [Arm("full", config, shared)]
        for key, value in asked["values"].items():
            full = field_of(key, fields[config], config)
            made.append(Arm(setting_name(full, value), config, shared | {full: value}))
        return made, {}
    full = field_of(asked["field"], fields[config], config)
    if len(set(asked["values"])) < 2:
        raise Missing(
            f"which values of {full}? {kind} {full} over V1, V2, ... of CONFIG"
        )
    made = []
    for value in asked["values"]:
        arm = Arm(setting_name(full, value), config, shared | {full: value})
        factors[arm.name] = value
        made.append(arm)
    if kind == "scale" and not all(
        isinstance(v, int | float) and not isinstance(v, bool) and v > 0
        for v in factors.values()
    ):
        raise Missing(f"scaling needs positive numbers for {full}")
    return made, factors


def config_of(word: str, context: Context) -> str:
    """The path of a config that a word names."""
    if word.endswith(".py") or "/" in word:
        return word
    stems = {p.stem: f"configs/{p.name}" for p in plans.shipped_configs()}
    named = {Path(c).stem: str(c) for c in context.options.get("configs", ())}
    stems |= named
    fits = [s for s in stems if word.lower() == s.lower()]
    fits = fits or [s for s in stems if word.lower() in s.lower().split("_")]
    if len(fits) != 1:
        what = "several configs" if fits else "no config"
        raise Missing(f"{word!r} names {what}; there are {', '.join(sorted(stems))}")
    return stems[fits[0]]


def fields_of(config: str, context: Context) -> dict[str, Any]:
    """Values of a config by dotted name."""
    found: dict[str, Any] = {}

    def walk(value: Any, prefix: str) -> None:
        for key, item in value.items():
            if isinstance(item, dict):
                walk(item, f"{prefix}{key}.")
            elif key != "type":
                found[prefix + key] = item

    walk(plans.described(Arm("x", config), context)["config"], "")
    return found


def field_of(word: str, fields: Mapping[str, Any], config: str) -> str:
    """The dotted name of the field that a word means."""
    word = SHORT.get(word, word)
    if word in fields:
        return word
    fits = [name for name in fields if name.split(".")[-1] == word]
    if len(fits) != 1:
        near = f"; it has {', '.join(fits)}" if fits else ""
        raise Missing(f"{config} has no single field {word!r}{near}")
    return fits[0]


def _name(config: str, own: Mapping[str, Any]) -> str:
    words = [Path(config).stem, *(f"{k.split('.')[-1]}={v}" for k, v in own.items())]
    return clean("+".join(words))


def setting_name(field: str, value: Any) -> str:
    """Name of the arm in which a field has a value."""
    return clean(f"{field.split('.')[-1]}={value}")


def clean(name: str) -> str:
    """A text as a name of an arm."""
    return re.sub(r"[^\w.=+-]|_vs_", "-", name, flags=re.ASCII)[:60]


def _distinct(arms: list[Arm]) -> list[Arm]:
    names = [a.name for a in arms]
    if len(set(names)) == len(names):
        return arms
    return [Arm(f"{a.name}.{i}", a.config, a.overrides) for i, a in enumerate(arms, 1)]


TOOLS = (read_question,)
