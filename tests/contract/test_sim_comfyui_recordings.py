"""The simulated ComfyUI does what the recorded real ones did.

Not covered: `stalled_client` (the stall is natural, as there is one sender, and a switch makes one),
`sigterm_midrun` (an exit status), the memory figures of `free` (a CPU's), `object_info_full` beyond the nodes
that are simulated, `frontend_network`, and of `gets` the paths in NOT_SIMULATED.
"""

import asyncio
import json
from collections.abc import Callable

import aiohttp
import pytest

from gpulane.testing.comfyui import CLASSIC_VERSION, MODERN_VERSION
from gpulane.testing.pictures import read_text_chunks, render_png
from tests.contract.comfyui_replay import Listener, Replay, replaying
from tests.contract.recordings import Json, differences, labels, recording

pytestmark = pytest.mark.anyio

both = pytest.mark.parametrize("version", [CLASSIC_VERSION, MODERN_VERSION])

NOTHING = "executing nothing"

NOT_SIMULATED = (
    "/internal/",
    "/experiment/models",
    "/templates/",
    "/docs/",
    "/extensions",
    "/scripts/",
    "/global_subgraphs",
    "/node_replacements",
    "/object_info",
)


async def ran(listener: Listener, times: int = 1) -> None:
    await listener.until(lambda _messages: listener.count(NOTHING) >= times)


@both
@pytest.mark.parametrize("name", ["run_noflags", "run_flags", "run_ksampler"])
async def test_one_run(name: str, version: str) -> None:
    async with replaying(name, version) as replay:
        recorded: list[Json] = replay.data["ws"]
        has_flags = any(found == "feature_flags" for found in labels(recorded))
        listener = await replay.connect(recorded[0]["text"]["data"]["sid"], flags=has_flags)
        await replay.send(replay.http[0])
        await ran(listener)
        await replay.send(replay.http[1])
        assert labels(listener.messages) == labels(recorded)
        assert_messages_alike(recorded, listener.messages)


def assert_messages_alike(recorded: list[Json], ours: list[Json]) -> None:
    """Every text message has the fields and types of the recorded one in its place."""
    real = [message["text"] for message in recorded if "text" in message]
    mine = [message["text"] for message in ours if "text" in message]
    for there, here in zip(real, mine, strict=True):
        if there["type"] in ("progress_state", "execution_error"):
            there, here = shown_node(there), shown_node(here)
        assert differences(there, here) == [], there["type"]


def shown_node(message: Json) -> Json:
    """One of the nodes of a progress_state: which come in which order is not fixed."""
    data = dict(message["data"])
    if "nodes" in data:
        data["nodes"] = next(iter(data["nodes"].values()))
    data.pop("current_inputs", None)
    return {"type": message["type"], "data": data}


@both
async def test_a_run_and_the_same_from_the_cache(version: str) -> None:
    async with replaying("run_basic_and_cached", version) as replay:
        listener = await replay.connect("cl-basic")
        await replay.send(replay.http[0])
        await ran(listener)
        await replay.send(replay.http[1])
        await replay.send(replay.http[2])
        await ran(listener, 2)
        await replay.send(replay.http[3])
        # Of the two statuses at a prompt's start and end some arrive together; their order is fixed.
        assert labels(listener.messages) == labels(replay.data["ws"])
        for entry in replay.http[4:]:
            entry["request"]["path"] = entry["request"]["path"].replace("rec_00003_", "rec_00001_")
            await replay.send(entry)


@both
async def test_pictures_are_served_with_ranges_and_carry_the_prompt(version: str) -> None:
    async with replaying("run_basic_and_cached", version) as replay:
        listener = await replay.connect("cl-basic")
        await replay.send(replay.http[0])
        await ran(listener)
        path = "/view?filename=rec_00001_.png&type=output"
        async with replay.session.get(path) as answer:
            png = await answer.read()
            assert answer.headers["Content-Disposition"] == 'filename="rec_00001_.png"'
            assert answer.headers["Accept-Ranges"] == "bytes"
        prompt = json.loads(read_text_chunks(png)["prompt"])
        assert prompt == replay.http[0]["request"]["json"]["prompt"]
        async with replay.session.get(path, headers={"Range": "bytes=0-9"}) as answer:
            assert answer.status == 206
            assert await answer.read() == png[:10]


@both
async def test_prompt_errors(version: str) -> None:
    async with replaying("prompt_errors", version) as replay:
        good = next(e["request"]["json"] for e in replay.http if is_ok(e))
        replay.engine._number = first_number(replay)
        for entry in replay.http:
            request = entry["request"]
            if request["method"] == "GET":
                continue  # when they were asked decides what they say
            if request["headers"] and request["headers"].get("Content-Type") == "text/plain":
                request["data"] = json.dumps(good)  # the recorder cut it off
            ours = await replay.send(entry)
            if entry["status"] == 400:
                assert in_order(ours) == in_order(entry["body"])
            elif entry["status"] == 200:
                assert ours["number"] == entry["body"]["number"]
                assert in_order(ours["node_errors"]) == in_order(entry["body"]["node_errors"])


def is_ok(entry: Json) -> bool:
    """Whether a whole prompt was taken."""
    if entry["status"] != 200 or entry["request"]["method"] != "POST":
        return False
    return entry["request"]["json"] is not None and entry["body"]["node_errors"] == {}


def first_number(replay: Replay) -> int:
    """What the counter of the recorded server had reached; explicit numbers are not counted."""
    first = next(entry for entry in replay.http if is_ok(entry))
    counted = [entry for entry in replay.http[: replay.http.index(first)] if is_counted(entry)]
    return first["body"]["number"] - len(counted)


def is_counted(entry: Json) -> bool:
    """Whether the server's counter moved: everything but what is not JSON and what names its number."""
    request = entry["request"]
    is_json = request["json"] is not None or request["data"] != "{not json"
    return request["method"] == "POST" and is_json and "number" not in (request["json"] or {})


def in_order(value: Json) -> Json:
    """With lists whose order comes from a set in the original sorted."""
    if isinstance(value, dict):
        return {
            str(key): sorted(item) if key == "dependent_outputs" else in_order(item)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
            for key, item in value.items()  # pyright: ignore[reportUnknownVariableType]
        }
    return [in_order(item) for item in value] if isinstance(value, list) else value  # pyright: ignore[reportUnknownVariableType]


@both
async def test_an_error_in_a_node(version: str) -> None:
    async with replaying("exec_error", version) as replay:
        listener = await replay.connect("cl-err")
        await replay.send(replay.http[0])
        await ran(listener)
        for entry in replay.http[1:]:
            drop_current_inputs(entry)
            path = entry["request"]["path"]
            answer = await replay.ask(entry["request"])
            drop_current_inputs({"body": answer[1]})
            assert answer[0] == entry["status"], path
        assert labels(listener.messages) == labels(replay.data["ws"])
        assert_messages_alike(replay.data["ws"], listener.messages)


def drop_current_inputs(value: Json) -> None:
    if isinstance(value, dict):
        value.pop("current_inputs", None)  # pyright: ignore[reportUnknownMemberType]
        for item in value.values():  # pyright: ignore[reportUnknownVariableType]
            drop_current_inputs(item)
    elif isinstance(value, list):
        for item in value:  # pyright: ignore[reportUnknownVariableType]
            drop_current_inputs(item)


@both
async def test_queue_order(version: str) -> None:
    async with replaying("queue_order", version, time_scale=0.3) as replay:
        first, second = await replay.connect("q1"), await replay.connect("q2")
        for entry in replay.http:
            body = entry["request"]["json"]
            if body is not None:
                body["client_id"] = body["client_id"].removeprefix("cl-")
            await replay.send(entry)
        for listener, name in ((first, "ws_q1"), (second, "ws_q2")):
            wanted = len(labels(replay.data[name]))
            await listener.until(lambda messages, wanted=wanted: len(messages) >= wanted)
        history = (await replay.ask({"method": "GET", "path": "/history", "json": None}))[1]
        recorded_names = {ours: replay.data["names"][real][0] for real, ours in replay.names.items()}
        assert [recorded_names[i] for i in history] == [name for name, _ in replay.data["exec_order"]]
        assert labels(first.messages) == labels(replay.data["ws_q1"])
        assert labels(second.messages) == labels(replay.data["ws_q2"])


@both
async def test_a_prompt_of_nobody_is_shown_to_all(version: str) -> None:
    async with replaying("no_client_id", version, time_scale=0.1) as replay:
        plain = await replay.connect("a")
        flagged = await replay.connect("b", flags=True)
        anonymous = await replay.connect("")
        await replay.send(replay.http[0])
        for listener in (plain, flagged, anonymous):
            await listener.until(lambda m: labels(m)[-1] == "status 0" and len(m) > 3)
        await replay.send(replay.http[1])
        replay.http[2]["request"]["json"]["client_id"] = "not-connected"
        await replay.send(replay.http[2])
        for listener in (plain, flagged, anonymous):
            await listener.until(lambda m: [x for x in labels(m) if x == "status 0"].__len__() == 2)
        assert labels(plain.messages) == labels(replay.data["ws_a_noflags"])
        assert labels(flagged.messages) == labels(replay.data["ws_b_flags"])
        assert labels(anonymous.messages) == labels(replay.data["ws_c_noid"])


@both
async def test_sockets_that_come_back(version: str) -> None:
    """A second socket takes over silently; when the first closes, the second is mute for ever."""
    async with replaying("reconnect", version, time_scale=0.3) as replay:
        first = await replay.connect("cl-rec")
        other = await replay.connect("other")
        replay.http[0]["request"]["json"]["client_id"] = "cl-rec"
        await replay.send(replay.http[0])
        await first.until(lambda _m: first.count("progress") == 5)
        await first.socket.close()
        back = await replay.connect("cl-rec")
        await back.until(lambda m: len(m) >= 3)
        recorded = labels(replay.data["reconnected"])
        assert labels(back.messages)[:3] == recorded[:3]
        second = await replay.connect("cl-rec")
        heard = len(back.messages)
        await ran(second)
        assert labels(second.messages)[:2] == labels(replay.data["second_socket_same_id"])[:2]
        assert len(back.messages) <= heard + 3, "the old socket stays open and mute"
        await back.socket.close()
        heard = len(second.messages)
        replay.http[1]["request"]["json"]["client_id"] = "cl-rec"
        await replay.send(replay.http[1])
        await other.until(lambda _m: other.count("status 0") == 2)
        assert len(second.messages) == heard, "taken off with the old one"
        assert labels(other.messages) == ["status 0 sid", *labels(replay.data["other_client"])[1:]]


@both
async def test_cancelling(version: str) -> None:
    async with replaying("cancel", version, time_scale=0.4) as replay:
        listener = await replay.connect("cl-can")
        for entry in replay.http:
            await until_it_is_time(replay, entry)
            await replay.send(entry)
        ends = ("execution_interrupted", "execution_success", NOTHING)
        recorded = [found for found in labels(replay.data["ws"]) if found in ends]
        await ran(listener, recorded.count(NOTHING))
        assert [found for found in labels(listener.messages) if found in ends] == recorded


async def until_it_is_time(replay: Replay, entry: Json) -> None:
    """Waits for what the recording waited for with its clock."""
    path: str = entry["request"]["path"]
    body: dict[str, Json] = entry["request"]["json"] or {}
    ours = [mine for real, mine in replay.names.items() if real in path or real == body.get("prompt_id")]
    if "/history/" in path and entry["body"]:
        await until(replay, lambda state: state["running"] not in ours and ours[0] not in state["pending"])
    elif path == "/queue" and "delete" in body:
        await until(replay, lambda state: state["running"] is not None)
    elif "interrupt" in path and ours:
        await until(replay, lambda state: state["running"] == ours[0] or ours[0] in state["pending"])
    elif path == "/queue" and "clear" in body:
        await until(replay, lambda state: state["running"] is not None and len(state["pending"]) == 1)
    elif path.endswith("/cancel") and ours:
        await until(replay, lambda state: state["running"] in ours)
    elif ("limit=2" in path and entry["status"] == 200) or entry["request"].get("data") == "":
        await until(replay, lambda state: state["running"] is None)


@both
async def test_a_late_global_interrupt_hits_the_next(version: str) -> None:
    async with replaying("interrupt_late_global", version, time_scale=0.5) as replay:
        one, two = replay.http[:2]
        await replay.send(one)
        await replay.send(two)
        await until(replay, lambda state: state["runs"] >= 1)
        await replay.send(replay.http[2])
        await until(replay, lambda state: state["runs"] >= 2)
        await replay.send(replay.http[3])
        await replay.send(replay.http[4])
        await replay.send(replay.http[5])
        await until(replay, lambda state: state["runs"] >= 3)
        await replay.send(replay.http[6])
        await until(replay, lambda state: state["runs"] >= 4)
        body = await replay.send(replay.http[7])
        assert next(iter(body.values()))["status"]["status_str"] == replay.data["b_status"] == "error"


async def until(replay: Replay, condition: Callable[[Json], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition((await replay.ask({"method": "GET", "path": "/sim/state", "json": None}))[1]):
            await asyncio.sleep(0.005)


@both
async def test_the_same_prompt_id_twice_runs_twice(version: str) -> None:
    async with replaying("duplicate_prompt_id", version) as replay:
        listener = await replay.connect("cl-dup")
        for entry in replay.http[:2]:
            entry["request"]["json"]["client_id"] = "cl-dup"
            await replay.send(entry)
        await ran(listener, replay.data["executions"])
        history = (await replay.ask({"method": "GET", "path": "/history", "json": None}))[1]
        assert len(history) == 1
        state = (await replay.ask({"method": "GET", "path": "/sim/state", "json": None}))[1]
        assert state["runs"] == replay.data["executions"] == 2


@both
async def test_progress_text_goes_to_everybody(version: str) -> None:
    async with replaying("progress_text", version) as replay:
        owner, bystander = await replay.connect("o"), await replay.connect("b")
        replay.http[0]["request"]["json"]["client_id"] = "o"
        await replay.send(replay.http[0])
        await ran(owner)
        await bystander.until(lambda _m: bystander.count("status 0") == 1)
        assert sorted(labels(owner.messages)) == sorted(labels(replay.data["owner"]))
        assert labels(bystander.messages) == labels(replay.data["bystander"])


@both
async def test_free_and_the_cache(version: str) -> None:
    """Which prompts were answered from the cache after which kind of /free."""
    async with replaying("free", version) as replay:
        listener = await replay.connect("cl-free")
        runs = 0
        for entry in replay.http:
            body = entry["request"]["json"]
            if body and "prompt" in body:
                body["client_id"] = "cl-free"
                await replay.send(entry)
                runs += 1
                await ran(listener, runs)
            else:
                await replay.send(entry)
                await until_unloaded(replay, body)
        cached = [found for found in labels(replay.data["ws"]) if found.startswith("execution_cached")]
        assert [x for x in labels(listener.messages) if x.startswith("execution_cached")] == cached


async def until_unloaded(replay: Replay, body: Json) -> None:
    """/free is done some time after it is acknowledged."""
    if body and (body.get("unload_models") or body.get("free_memory")):
        await until(replay, lambda state: not state["resident"])


@both
async def test_a_tie_in_the_heap(version: str) -> None:
    """The second of two prompts with one number and id gets a 500 and is queued all the same."""
    async with replaying("number_and_id_tie", version, time_scale=0.2) as replay:
        replay.engine._number = replay.http[0]["body"]["number"]
        for entry in replay.http[:4]:
            await replay.send(entry)
            await asyncio.sleep(0.005)  # the items differ by the millisecond of their creation alone
        await until(replay, lambda state: state["running"] is None and not state["pending"])
        for entry in replay.http[4:6]:
            await replay.send(entry)


async def test_poison_kills_the_old_thread() -> None:
    async with replaying("poison", CLASSIC_VERSION) as replay:
        poisoned = [entry for entry in replay.http if is_poisoned(entry["request"]["json"])]
        start = replay.http.index(poisoned[0])
        await replay.send(replay.http[start])
        await until(replay, lambda state: state["runner_dead"])
        # All of HTTP works, nothing runs, and an interrupt changes nothing.
        for entry in replay.http[start + 1 : -1]:
            ours = await replay.send(entry)
            if entry["request"]["path"] == "/prompt" and entry["request"]["method"] == "GET":
                assert ours == entry["body"] == {"exec_info": {"queue_remaining": 2}}


def is_poisoned(body: Json) -> bool:
    return isinstance(body, dict) and "extra_data" in body and body["extra_data"] is None


async def test_a_null_in_pnginfo_breaks_the_job_list() -> None:
    async with replaying("poison", MODERN_VERSION) as replay:
        await replay.send(replay.http[0])
        await until(replay, lambda state: state["runs"] == 1)
        for entry in replay.http[1:5]:
            await replay.send(entry)


@both
async def test_a_killed_server_forgets(version: str) -> None:
    async with replaying("killed_midrun_and_restarted", version, time_scale=0.2) as replay:
        before = await replay.connect("cl-kill")
        for entry in replay.http[:3]:
            entry["request"]["json"]["client_id"] = "cl-kill"
            await replay.send(entry)
        await before.until(lambda _m: before.count("progress") == 4)
        await replay.session.post("/sim/faults", json={"restart": True})
        await before.until(lambda _m: before.socket.closed or True)
        for entry in replay.http[3:7]:
            assert (await send_when_up(replay, entry)) == entry["status"]
        after = await replay.connect("cl-kill")
        replay.http[7]["request"]["json"]["client_id"] = "cl-kill"
        ours = await replay.send(replay.http[7])
        assert ours["number"] == 0
        await ran(after)
        assert sorted(labels(after.messages)) == sorted(labels(replay.data["ws_after"]))
        assert before.socket.close_code == 1006


async def send_when_up(replay: Replay, entry: Json) -> int:
    async with asyncio.timeout(10):
        while True:
            try:
                return (await replay.ask(entry["request"]))[0]
            except aiohttp.ClientError:
                await asyncio.sleep(0.01)


@both
async def test_gets(version: str) -> None:
    async with replaying("gets", version) as replay:
        port = str(replay.engine.server.port)
        recorded_port = "8188" if version == CLASSIC_VERSION else "8189"
        for entry in replay.http:
            request = entry["request"]
            if any(request["path"].removeprefix("/api").startswith(path) for path in NOT_SIMULATED):
                continue
            headers: dict[str, str] = request["headers"] or {}
            request["headers"] = {key: value.replace(recorded_port, port) for key, value in headers.items()}
            status, body = await replay.ask(request)
            assert status == entry["status"], (request, body)
            await compare_get(request["path"], entry, body)


async def compare_get(path: str, entry: Json, body: Json) -> None:
    """Bodies that do not depend on what ran before. The recorder cut long ones and put `...` behind."""
    real = entry["body"]
    if (
        real is None
        or "history" in path
        or "jobs" in path
        or path == "/"
        or (isinstance(real, dict) and "_raw" in real)
    ):
        return
    if path.endswith("/system_stats"):
        real["devices"][0] |= {"index": 0}
        real["system"]["comfy_package_versions"] = body["system"].get("comfy_package_versions")
    found = [line for line in differences(real, body) if "comfy_package_versions" not in line]
    assert found == [], path


@both
async def test_uploads(version: str) -> None:
    """The recording keeps no bodies of forms; this sends what it describes."""
    async with replaying("upload", version) as replay:
        one, two = (render_png(text, 1, "x", 8, 8, {}) for text in ("one", "two"))
        forms: list[tuple[bytes | None, dict[str, str]]] = [
            (one, {}),
            (one, {}),
            (two + b"x", {}),
            (two + b"x", {"overwrite": "true"}),
            (one, {"subfolder": "sub"}),
            (one, {"subfolder": "../out"}),
            (one, {"type": "temp"}),
            (None, {}),
            (one, {"type": "bogus"}),
            (one, {"original_ref": '{"filename":"up.png","type":"input"}', "subfolder": "clipspace"}),
            (b"third", {}),
        ]
        for entry, (file, fields) in zip(replay.http, forms, strict=False):
            form = aiohttp.FormData(fields)
            if file is not None:
                form.add_field("image", file, filename="mup.png" if "original_ref" in fields else "up.png")
            else:
                form.add_field("nothing", "x", filename="x.txt")
            async with replay.session.post(entry["request"]["path"], data=form) as answer:
                assert answer.status == entry["status"], fields
                if answer.status == 200:
                    real = json.loads(json.dumps(entry["body"]).replace(upload_name(replay), "up"))
                    assert await answer.json() == real


def upload_name(replay: Replay) -> str:
    return replay.http[0]["body"]["name"].removesuffix(".png")


@both
async def test_a_missing_input_file(version: str) -> None:
    async with replaying("upload", version) as replay:
        missing = next(entry for entry in replay.http if "missing.png" in json.dumps(entry["request"]))
        assert await replay.send(missing) == missing["body"]


@both
async def test_object_info_of_the_simulated_nodes(version: str) -> None:
    real = recording(f"comfyui/{version}/object_info_full")
    async with replaying("run_noflags", version) as replay:
        ours = (await replay.ask({"method": "GET", "path": "/object_info", "json": None}))[1]
    for name, entry in ours.items():
        if name in real:
            assert set(entry["input"].get("required", {})) == set(real[name]["input"].get("required", {})), (
                name
            )
            assert entry["output"] == real[name]["output"]
            assert set(entry) <= {*real[name], "output_tooltips"}, name
