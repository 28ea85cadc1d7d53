"""What ComfyUI clients do, each compared with what the engine itself would say."""

import io
import uuid
from typing import Any

import aiohttp
from PIL import Image

from tests.drive.events import listening
from tests.drive.ground import Answer, Client, Ground, Skipped, until
from tests.drive.workload import Workflow, empty, inverted, save

ENDINGS = ("execution_success", "end")
SAME_TYPES = {"invalid_prompt": "missing_node_type"}
"""Older ComfyUIs call a node that is not there by another name."""


async def one_prompt(ground: Ground) -> str:
    """Prompt, events in ComfyUI's order, history, the file's bytes."""
    me = ground.alice
    async with listening(me, "drive-one") as heard:
        workflow = ground.workflows.slow(0.6, seed=new_seed())
        answer = (await me.post("/prompt", {"prompt": workflow, "client_id": "drive-one"})).ok().json
        assert answer["node_errors"] == {} and isinstance(answer["number"], int | float), answer
        prompt_id = answer["prompt_id"]
        kinds = await heard.end_of(prompt_id)
    assert kinds[0] == "execution_start" and tuple(kinds[-2:]) == ENDINGS, kinds
    assert {"execution_cached", "executing", "executed"} <= set(kinds), kinds
    assert heard.messages[0][0] == "status", "a status comes first"
    entry = (await me.get(f"/history/{prompt_id}")).ok().json[prompt_id]
    assert entry["status"]["status_str"] == "success" and entry["status"]["completed"], entry["status"]
    job = await me.job(prompt_id)
    engine = await ground.engine_of(job)
    theirs = (await engine.get(f"/history/{prompt_id}")).ok().json[prompt_id]
    assert shape(entry) == shape(theirs), "the history entry differs from the engine's"
    files = await seen_alike(me, engine, entry, theirs)
    counts = f"{len(kinds)} events, {heard.previews} previews, {files} file(s)"
    return f"{counts} byte for byte, history as the engine's"


async def seen_alike(me: Client, engine: Client, entry: Any, theirs: Any) -> int:
    """Compare each file through the gateway with the engine's own."""
    count = 0
    for ours, original in zip(pictures(entry), pictures(theirs), strict=True):
        through, direct = await me.get("/view", **ours), await engine.get("/view", **original)
        assert through.ok().body == direct.ok().body, f"other bytes for {ours}"
        assert through.headers["Content-Type"] == direct.headers["Content-Type"], through.headers
        count += 1
    assert count, "no file came out"
    return count


async def spread(ground: Ground) -> str:
    """Several prompts use all GPUs, and each runs once."""
    count = 4 * len(ground.comfyui)
    jobs = [await ground.alice.prompt(ground.workflows.slow(0.5, seed=new_seed())) for _ in range(count)]
    ended = [await ground.alice.succeeded(job) for job in jobs]
    used = {job["gpu"] for job in ended}
    assert len(used) == len(ground.comfyui), f"only {sorted(used)} worked"
    assert all(len(job["attempts"]) == 1 for job in ended), "a job was tried twice"
    counts = [sum(job["gpu"] == gpu for job in ended) for gpu in sorted(used)]
    return f"{count} prompts over {len(used)} GPU(s): {' + '.join(map(str, counts))}"


async def cancel_waiting(ground: Ground) -> str:
    """A waiting prompt that is deleted never runs; nobody else's prompt can be deleted."""
    me = ground.alice
    busy = [await me.prompt(ground.workflows.slow(1.5, seed=new_seed())) for _ in ground.comfyui]
    await me.started(busy[0])
    theirs = await ground.bob.prompt(ground.workflows.quick(new_seed()))
    mine = await me.prompt(ground.workflows.quick(new_seed()))
    waiting = {item[1] for item in (await me.get("/queue")).ok().json["queue_pending"]}
    assert mine in waiting and theirs not in waiting, f"the queue shows {waiting}"
    assert (await me.post("/queue", {"delete": [mine, theirs]})).status == 200
    await ground.bob.succeeded(theirs)
    found = await me.ended(mine)
    assert found["state"] == "cancelled" and not found["attempts"], found
    for job in busy:
        await me.succeeded(job)
    assert not await histories_with(ground, mine), "an engine ran it"
    return "own prompt cancelled before any engine saw it; another account's went on"


async def interrupt_own(ground: Ground) -> str:
    """Interrupts reach the caller's own running prompt alone."""
    long = [await ground.alice.prompt(ground.workflows.slow(3, seed=new_seed())) for _ in ground.comfyui]
    for job in long:
        await ground.alice.started(job)
    other = await ground.bob.prompt(ground.workflows.quick(new_seed()))
    assert (await ground.bob.post("/interrupt", {})).status == 200
    assert (await ground.bob.post("/interrupt", {"prompt_id": long[0]})).status == 200
    assert (await ground.alice.job(long[0]))["state"] == "running", "a stranger's interrupt hit"
    async with listening(ground.alice, "drive"):
        assert (await ground.alice.post("/interrupt", {"prompt_id": long[0]})).status == 200
        ended = await ground.alice.ended(long[0])
    assert ended["state"] == "cancelled", ended["state"]
    messages = (await ground.alice.get(f"/history/{long[0]}")).ok().json[long[0]]["status"]["messages"]
    assert messages[-1][0] == "execution_interrupted", messages[-1]
    await ground.bob.succeeded(other)
    for job in long[1:]:
        await ground.alice.succeeded(job)
    return f"own one interrupted, {len(long) - 1} other running and one waiting untouched"


def bad_bodies(seed: int) -> dict[str, object]:
    ok: Workflow = {"1": empty(64, seed), "save": save("1", "drive/bad")}
    image = {"width": 64, "height": 64, "batch_size": 1, "color": 0}
    return {
        "no prompt": {"client_id": "drive"},
        "empty graph": {"prompt": {}},
        "no output": {"prompt": {"1": empty(64, seed)}},
        "unknown node": {"prompt": {**ok, "x": {"class_type": "NoSuchNode", "inputs": {}}}},
        "no class": {"prompt": {"1": {"inputs": {}}, "save": save("1", "drive/bad")}},
        "missing input": {"prompt": {"1": inverted("0") | {"inputs": {}}, "save": save("1", "drive/bad")}},
        "link to nothing": {"prompt": {"1": inverted("77"), "save": save("1", "drive/bad")}},
        "text for a number": {
            "prompt": {
                "1": {"class_type": "EmptyImage", "inputs": {**image, "width": "wide"}},
                "save": save("1", "drive/bad"),
            }
        },
        "number too large": {
            "prompt": {
                "1": {"class_type": "EmptyImage", "inputs": {**image, "width": 10**9}},
                "save": save("1", "drive/bad"),
            }
        },
        "missing file": {
            "prompt": {
                "1": {"class_type": "LoadImage", "inputs": {"image": "no-such-file.png"}},
                "save": save("1", "drive/bad"),
            }
        },
    }


async def invalid_prompts(ground: Ground) -> str:
    """What the engine refuses is refused with its status and error type."""
    different: list[str] = []
    bodies = bad_bodies(new_seed())
    for name, body in bodies.items():
        ours = told(await ground.alice.post("/prompt", body))
        theirs = [told(await engine.post("/prompt", body)) for engine in ground.comfyui]
        if ours not in theirs:
            different.append(f"{name}: {ours}, the engine {theirs}")
    assert not different, "; ".join(different)
    return f"{len(bodies)} bad prompts, each refused with the status and type of an engine"


async def partly_valid(ground: Ground) -> str:
    """A graph with one good and one bad output runs the good one, and says what is wrong with the other."""
    seed = new_seed()
    graph: Workflow = {
        "1": empty(64, seed),
        "good": save("1", "drive/partly"),
        "bad": save("77", "drive/partly"),
    }
    theirs = (await ground.comfyui[0].post("/prompt", {"prompt": graph})).ok().json
    ours = (await ground.alice.post("/prompt", {"prompt": graph})).ok().json
    job = await ground.alice.ended(ours["prompt_id"])
    assert job["state"] == "succeeded", f"{job['state']}: {job['error']}"
    entry = (await ground.alice.get(f"/history/{ours['prompt_id']}")).ok().json[ours["prompt_id"]]
    assert set(entry["outputs"]) == {"good"}, entry["outputs"]
    ours_marked, theirs_marked = sorted(ours["node_errors"]), sorted(theirs["node_errors"])
    assert ours_marked == theirs_marked, f"node_errors {ours_marked}, the engine {theirs_marked}"
    return f"200 with node_errors for {theirs_marked}, the good output made"


async def upload(ground: Ground) -> str:
    """An uploaded picture is loaded, inverted and saved, as the engine does it."""
    name = f"drive-{uuid.uuid4().hex[:8]}.png"
    picture = Image.new("RGB", (48, 32), (10, 200, 90))
    content = io.BytesIO()
    picture.save(content, "PNG")
    form = aiohttp.FormData()
    form.add_field("image", content.getvalue(), filename=name, content_type="image/png")
    answer = (await ground.alice.post("/upload/image", data=form)).ok().json
    assert answer["name"] == name and answer["type"] == "input", answer
    job = await ground.alice.prompt(ground.workflows.from_file(name))
    await ground.alice.succeeded(job)
    entry = (await ground.alice.get(f"/history/{job}")).ok().json[job]
    through = await pixels_of(ground.alice, entry)
    engine = await ground.engine_of(await ground.alice.job(job))
    direct = await engine.prompt(ground.workflows.from_file(name))

    async def theirs() -> Any:
        return (await engine.get(f"/history/{direct}")).ok().json.get(direct)

    assert through == await pixels_of(engine, await until(theirs)), "the engine itself makes another picture"
    seen = (await ground.alice.get("/view", filename=name, type="input")).ok().body
    assert seen == content.getvalue(), "the upload came back with other bytes"
    return "uploaded to every engine, the inverted picture is the engine's own"


async def object_info(ground: Ground) -> str:
    """The node lists are the engine's, or all engines' together."""
    ours = (await ground.alice.get("/object_info")).ok().json
    theirs = [(await engine.get("/object_info")).ok().json for engine in ground.comfyui]
    every = set[str]().union(*theirs)
    assert set(ours) == every, sorted(set(ours) ^ every)[:5]
    alike = sum(any(ours[name] == one.get(name) for one in theirs) for name in ours)
    if len(theirs) == 1:
        assert ours == theirs[0], f"{len(ours) - alike} entries differ"
    one = (await ground.alice.get("/object_info/SaveImage")).ok().json
    assert one["SaveImage"] == ours["SaveImage"], "one entry alone differs"
    return (
        f"{len(ours)} node classes of {len(theirs)} engine(s), {alike} entries exactly as one of them has it"
    )


async def same_prompt_id(ground: Ground) -> str:
    """The same prompt_id with the same content is the same job; with other content it is refused."""
    prompt_id, seed = str(uuid.uuid4()), new_seed()
    body = {"prompt": ground.workflows.slow(0.5, seed), "client_id": "drive", "prompt_id": prompt_id}
    first = (await ground.alice.post("/prompt", body)).ok().json
    second = (await ground.alice.post("/prompt", body)).ok().json
    assert first == second and first["prompt_id"] == prompt_id, (first, second)
    other = await ground.alice.post("/prompt", body | {"prompt": ground.workflows.quick(seed)})
    assert other.status == 400, other.status

    async def entry() -> Any:
        return (await ground.alice.get(f"/history/{prompt_id}")).ok().json.get(prompt_id)

    found = await until(entry)
    assert found["status"]["status_str"] == "success", found["status"]
    after = (await ground.alice.post("/prompt", body)).ok().json
    assert after["prompt_id"] == prompt_id, after
    jobs = [await ground.alice.get("/history", max_items="200")]
    assert list(jobs[0].ok().json).count(prompt_id) == 1
    return "sent three times, one job, one history entry; other content refused with 400"


async def static_files(ground: Ground) -> str:
    """The page and a sample of its files are the engine's, byte for byte."""
    ours = (await ground.alice.get("/comfy/")).ok()
    pages = [(engine, (await engine.get("/")).ok().body) for engine in ground.comfyui]
    engine = next((engine for engine, body in pages if body == ours.body), None)
    assert engine is not None, "the page is no engine's"
    names = linked(ours.body)
    if not names:
        raise Skipped("the page names no files")
    total = len(ours.body)
    for name in names[:20]:
        through, direct = await ground.alice.get(f"/comfy/{name}"), await engine.get(f"/{name}")
        assert (through.status, through.body) == (direct.status, direct.body), name
        assert through.headers.get("Content-Type") == direct.headers.get("Content-Type"), name
        total += len(through.body)
    return f"page and {len(names[:20])} files alike, {total / 1e6:.1f} MB"


# --- small things


def linked(page: bytes) -> list[str]:
    """The page's own scripts and styles, relative as it names them."""
    import re

    found = re.findall(r'(?:src|href)="(?:\./|/)?([^":?#]+\.(?:js|css|ico|json|png|svg))"', page.decode())
    return list(dict.fromkeys(found))


async def pixels_of(client: Client, entry: Any) -> bytes:
    picture = (await client.get("/view", **pictures(entry)[0])).ok()
    return Image.open(io.BytesIO(picture.body)).convert("RGB").tobytes()


def pictures(entry: Any) -> list[dict[str, str]]:
    found = [
        {"filename": image["filename"], "subfolder": image["subfolder"], "type": image["type"]}
        for output in entry["outputs"].values()
        for image in output.get("images", ())
    ]
    assert found, "no picture in the outputs"
    return found


def shape(entry: Any) -> Any:
    """What must be alike in a history entry of ours and an engine's: not numbers, times, client ids."""
    return {
        "keys": sorted(entry),
        "prompt": entry["prompt"][2],
        "outputs to execute": sorted(entry["prompt"][4]),
        "nodes": sorted(entry["outputs"]),
        "status": entry["status"]["status_str"],
        "messages": [name for name, _ in entry["status"]["messages"]],
    }


def told(answer: Answer) -> tuple[int, str]:
    """Status and error type of a refusal."""
    try:
        error = answer.json.get("error")
    except AssertionError:
        error = None
    kind = str(error.get("type", "")) if isinstance(error, dict) else ""  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
    return answer.status, SAME_TYPES.get(kind, kind)


async def histories_with(ground: Ground, prompt_id: str) -> int:
    """How many engines have a prompt in their history."""
    return sum([prompt_id in (await e.get(f"/history/{prompt_id}")).ok().json for e in ground.comfyui])


def new_seed() -> int:
    return uuid.uuid4().int % 0xFFFFFF
