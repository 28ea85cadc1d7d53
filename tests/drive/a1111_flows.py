"""What A1111 clients do, each compared with what the engine itself would say."""

import asyncio
import base64
import io
import json
import uuid
from typing import Any

from PIL import Image

from tests.drive.comfyui_flows import new_seed
from tests.drive.ground import Answer, Client, Ground, Skipped, until

LISTS = [
    "sd-models",
    "samplers",
    "schedulers",
    "upscalers",
    "latent-upscale-modes",
    "hypernetworks",
    "face-restorers",
    "prompt-styles",
    "embeddings",
    "scripts",
    "script-info",
    "sd-vae",
    "loras",
]


async def txt2img(ground: Ground) -> str:
    """A picture, with what says where it was made."""
    request = ground.pictures.small(seed=new_seed(), steps=4)
    answer = (await ground.alice.post("/sdapi/v1/txt2img", request)).ok()
    direct = [(await engine.post("/sdapi/v1/txt2img", request)).ok() for engine in ground.a1111]
    assert sorted(answer.json) == sorted(direct[0].json), sorted(answer.json)
    assert picture_of(answer).size == (64, 64)
    info, theirs = json.loads(answer.json["info"]), json.loads(direct[0].json["info"])
    assert sorted(info) == sorted(theirs), "info has other keys"
    gpu, job = answer.headers.get("X-Gpulane-Gpu"), answer.headers.get("X-Gpulane-Job")
    assert gpu and job, "no X-Gpulane-Gpu or X-Gpulane-Job"
    alike = any(pixels(answer) == pixels(one) for one in direct)
    return f"{info['sd_model_name']} on {gpu}, pixels {'equal to' if alike else 'unlike'} the engine's own"


async def img2img(ground: Ground) -> str:
    """The result goes in again."""
    first = (await ground.alice.post("/sdapi/v1/txt2img", ground.pictures.small(seed=new_seed()))).ok().json
    request = ground.pictures.small(seed=3, init_images=first["images"], denoising_strength=0.5)
    answer = (await ground.alice.post("/sdapi/v1/img2img", request)).ok()
    assert picture_of(answer).size == (64, 64)
    none = await ground.alice.post("/sdapi/v1/img2img", ground.pictures.small(seed=3))
    theirs = await ground.a1111[0].post("/sdapi/v1/img2img", ground.pictures.small(seed=3))
    assert none.status == theirs.status, f"without init_images: {none.status}, the engine {theirs.status}"
    return f"64x64 from the picture before; without init_images {none.status} as the engine"


async def wrong_names(ground: Ground) -> str:
    """What the engine would silently replace is refused, with the nearest names."""
    sampler = ground.pictures.small(seed=1, sampler_name="Eulre")
    model = ground.pictures.small(seed=1, override_settings={"sd_model_checkpoint": "no-such-model"})
    seen: list[str] = []
    for name, request in (("sampler", sampler), ("checkpoint", model)):
        answer = await ground.alice.post("/sdapi/v1/txt2img", request)
        assert 400 <= answer.status < 500, f"{name}: {answer.status} {answer.body[:200]!r}"
        seen.append(f"{name} {answer.status}")
        if name == "sampler":
            assert b"Euler" in answer.body, f"no nearest name: {answer.body[:300]!r}"
    return ", ".join(seen)


async def own_options(ground: Ground) -> str:
    """What one account sets is seen by that account alone, and used for its pictures."""
    before = [(await engine.get("/sdapi/v1/options")).ok().json for engine in ground.a1111]
    kept = (await ground.alice.get("/sdapi/v1/options")).ok().json
    models = (await ground.alice.get("/sdapi/v1/sd-models")).ok().json
    chosen = models[-1]["title"]
    wanted = {"eta_noise_seed_delta": 31337, "sd_model_checkpoint": chosen}
    (await ground.alice.post("/sdapi/v1/options", wanted)).ok()
    mine, theirs = [(await who.get("/sdapi/v1/options")).ok().json for who in (ground.alice, ground.bob)]
    assert mine["eta_noise_seed_delta"] == 31337 and mine["sd_model_checkpoint"] == chosen, "not kept"
    assert theirs == kept, "another account sees it"
    answer = (await ground.alice.post("/sdapi/v1/txt2img", ground.pictures.small(seed=5))).ok().json
    name = json.loads(answer["info"])["sd_model_name"]
    assert name == models[-1]["model_name"], f"made with {name}"
    other = (await ground.bob.post("/sdapi/v1/txt2img", ground.pictures.small(seed=5))).ok().json
    theirs_name = json.loads(other["info"])["sd_model_name"]
    restored = {key: kept[key] for key in wanted}
    (await ground.alice.post("/sdapi/v1/options", restored)).ok()
    after = [(await engine.get("/sdapi/v1/options")).ok().json for engine in ground.a1111]
    assert before == after, "the engine's own options changed"
    return f"mine made with {name}, the other account's with {theirs_name}; the engine's own unchanged"


async def progress(ground: Ground) -> str:
    """Progress rises for the account whose picture it is, by its own task id, and is idle for others."""
    task = f"task({uuid.uuid4().hex[:12]})"
    # Not shorter than this: the gateway looks at most once a second.
    request = ground.pictures.slow(2.5 / ground.pictures.pace, seed=new_seed(), force_task_id=task)
    shares: list[float] = []
    seen: set[str] = set()
    async with asyncio.TaskGroup() as tasks:
        work = tasks.create_task(ground.alice.post("/sdapi/v1/txt2img", request))
        while not work.done():
            share = (await ground.alice.get("/sdapi/v1/progress", skip_current_image="true")).ok().json
            query = {"id_task": task, "id_live_preview": -1, "live_preview": False}
            of_task = (await ground.alice.post("/internal/progress", query)).ok().json
            others = (await ground.bob.get("/sdapi/v1/progress")).ok().json
            assert others["progress"] == 0 and others["state"]["job_count"] == 0, "seen by another account"
            shares.append(share["progress"])
            seen |= {name for name in ("active", "queued", "completed") if of_task[name]}
            await asyncio.sleep(0.1)
    answer = work.result().ok().json
    assert len(set(shares)) >= 3 and max(shares) > 0.3, f"progress did not rise: {shares}"
    assert "active" in seen, f"/internal/progress said {seen}"
    query = {"id_task": task, "id_live_preview": -1, "live_preview": False}
    last = (await ground.alice.post("/internal/progress", query)).ok().json
    assert last["completed"] and not last["active"], last
    echoed = answer["parameters"].get("force_task_id")
    echo = "" if echoed == task else "; the answer echoes the gateway's own id"
    states = ", ".join(sorted(seen))
    return f"{len(set(shares))} values up to {max(shares):.2f}; task {states}, then completed{echo}"


async def interrupt(ground: Ground) -> str:
    """Interrupt ends the caller's own running picture, else its waiting ones; nobody else's."""
    long = [ground.pictures.slow(3, seed=new_seed()) for _ in ground.a1111]
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as tasks:
        began = loop.time()
        running = [tasks.create_task(ground.alice.post("/sdapi/v1/txt2img", request)) for request in long]

        async def all_run() -> bool:
            return len(await jobs_of(ground, "running")) == len(long)

        await until(all_run)
        waiting = tasks.create_task(ground.bob.post("/sdapi/v1/txt2img", ground.pictures.small(seed=8)))

        async def is_waiting() -> bool:
            return bool(await jobs_of(ground, "queued"))

        await until(is_waiting)
        (await ground.bob.post("/sdapi/v1/interrupt")).ok()
        refused = await waiting
        assert not any(task.done() for task in running), "somebody else's picture was interrupted"
        (await ground.alice.post("/sdapi/v1/interrupt")).ok()
        answers = [await task for task in running]
        took = loop.time() - began
    statuses = {answer.status for answer in answers}
    assert statuses == {200}, f"interrupted pictures were answered with {statuses}"
    assert all(answer.json["images"] for answer in answers), "no partial picture"
    return f"waiting one answered {refused.status}, running ones 200 with what there was, after {took:.1f} s"


async def lists(ground: Ground) -> str:
    """The lists are the engine's; of several engines, all of theirs."""
    entries = 0
    for name in LISTS:
        ours = await ground.alice.get(f"/sdapi/v1/{name}")
        theirs = [await engine.get(f"/sdapi/v1/{name}") for engine in ground.a1111]
        assert ours.status == theirs[0].status, f"{name}: {ours.status}, the engine {theirs[0].status}"
        if ours.status == 200 and len(theirs) == 1:
            assert ours.json == theirs[0].json, f"{name} differs"
        entries += len(ours.json) if ours.status == 200 else 0
    return f"{len(LISTS)} lists, {entries} entries"


async def png_info(ground: Ground) -> str:
    """What a picture says about itself."""
    made = (await ground.alice.post("/sdapi/v1/txt2img", ground.pictures.small(seed=9))).ok().json
    body = {"image": f"data:image/png;base64,{made['images'][0]}"}
    ours, theirs = [
        (await c.post("/sdapi/v1/png-info", body)).ok().json for c in (ground.alice, ground.a1111[0])
    ]
    assert ours == theirs and "a picture" in ours["info"], ours
    return "as the engine reads it"


async def extras(ground: Ground) -> str:
    """Enlarging a picture."""
    made = (await ground.alice.post("/sdapi/v1/txt2img", ground.pictures.small(seed=9))).ok().json
    body = {"image": made["images"][0], "upscaler_1": "Lanczos", "upscaling_resize": 2}
    direct = await ground.a1111[0].post("/sdapi/v1/extra-single-image", body)
    if direct.status != 200:
        raise Skipped(f"the engine itself answers {direct.status}")
    answer = (await ground.alice.post("/sdapi/v1/extra-single-image", body)).ok().json
    sizes = [Image.open(io.BytesIO(base64.b64decode(one["image"]))).size for one in (answer, direct.json)]
    assert sizes[0] == sizes[1] == (128, 128), sizes
    return "64x64 to 128x128, as the engine does"


# --- small things


async def jobs_of(ground: Ground, state: str) -> list[Any]:
    answer = await ground.alice.get("/gpulane/v1/jobs", state=state, service="a1111", limit="50")
    return answer.ok().json["jobs"]


def picture_of(answer: Answer) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(answer.json["images"][0])))


def pixels(answer: Answer) -> bytes:
    return picture_of(answer).convert("RGB").tobytes()


async def is_idle(engine: Client) -> bool:
    told = (await engine.get("/sdapi/v1/progress", skip_current_image="true")).ok().json
    return told["progress"] == 0 and told["state"]["job_count"] == 0
