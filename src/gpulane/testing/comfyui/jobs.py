"""GET /api/jobs of newer ComfyUI versions: queue and history in one list."""

from collections.abc import Mapping
from typing import Final

from gpulane.testing.card import Json
from gpulane.testing.comfyui.queue import Item, PromptQueue

STATUSES: Final = ("pending", "in_progress", "completed", "failed", "cancelled")
PREVIEWABLE: Final = ("images", "video", "audio", "3d", "text")


def find_job(queue: PromptQueue, job_id: str) -> Json | None:
    """One job in full."""
    for item, status in _queued(queue):
        if item[1] == job_id:
            return _from_queue(item, status)
    record = queue.history.get(job_id)
    if record is None:
        return None
    job = _from_history(record)
    _number, _id, prompt, extra_data, _outputs = record["prompt"]
    job["outputs"] = record["outputs"]
    job["execution_status"] = record["status"]
    job["workflow"] = {"prompt": prompt, "extra_data": extra_data}
    return job


def list_jobs(queue: PromptQueue, query: Mapping[str, str]) -> Json:
    """The answer of GET /api/jobs; ValueError for a status or a number that is none."""
    wanted = [status for status in query.get("status", "").split(",") if status]
    for status in wanted:
        if status not in STATUSES:
            raise ValueError(f"Invalid status value(s): {status}. Valid values: {', '.join(STATUSES)}")
    limit = int(query["limit"]) if "limit" in query else None
    offset = int(query.get("offset", 0))
    jobs = [_from_queue(item, status) for item, status in _queued(queue)]
    jobs += [_from_history(record) for record in queue.history.values()]
    jobs = [job for job in jobs if not wanted or job["status"] in wanted]
    jobs.sort(key=lambda job: job["create_time"] or 0, reverse=query.get("sort_order", "desc") == "desc")
    end = None if limit is None else offset + limit
    return {
        "jobs": jobs[offset:end],
        "pagination": {
            "offset": offset,
            "limit": limit,
            "total": len(jobs),
            "has_more": end is not None and end < len(jobs),
        },
    }


def _queued(queue: PromptQueue) -> list[tuple[Item, str]]:
    running = [(queue.running, "in_progress")] if queue.running else []
    return running + [(item, "pending") for item in queue.heap]


def _with_workflow(job: dict[str, Json], extra_data: dict[str, Json]) -> dict[str, Json]:
    # A null in extra_pnginfo makes this an error 500, as it does in the original.
    workflow_id = extra_data.get("extra_pnginfo", {}).get("workflow", {}).get("id")
    return job | {"workflow_id": workflow_id} if workflow_id is not None else job


def _from_queue(item: Item, status: str) -> dict[str, Json]:
    number, prompt_id, _prompt, extra_data, _outputs = item
    job = {
        "id": prompt_id,
        "status": status,
        "priority": number,
        "create_time": extra_data.get("create_time"),
        "outputs_count": 0,
    }
    return _with_workflow(job, extra_data)


def _from_history(record: Json) -> dict[str, Json]:
    number, prompt_id, _prompt, extra_data, _outputs = record["prompt"]
    messages = dict(record["status"]["messages"])
    ended = [
        name for name in ("execution_success", "execution_error", "execution_interrupted") if name in messages
    ]
    status = "completed"
    if record["status"]["status_str"] == "error":
        status = "cancelled" if "execution_interrupted" in messages else "failed"
    job = {
        "id": prompt_id,
        "status": status,
        "priority": number,
        "create_time": extra_data.get("create_time"),
        "execution_start_time": messages.get("execution_start", {}).get("timestamp"),
        "execution_end_time": messages[ended[0]]["timestamp"] if ended else None,
    }
    if "execution_error" in messages:
        job["execution_error"] = messages["execution_error"]
    count, preview = _outputs_summary(record["outputs"])
    job["outputs_count"] = count
    if preview is not None:
        job["preview_output"] = preview
    return _with_workflow(job, extra_data)


def _outputs_summary(outputs: dict[str, Json]) -> tuple[int, Json | None]:
    """How many files, and the one to show: a saved one rather than a temporary one."""
    count, saved, temporary = 0, None, None
    for node_id, output in outputs.items():
        for media, files in output.items():
            if media not in PREVIEWABLE:
                continue
            for file in files:
                count += 1
                if not isinstance(file, dict):
                    continue
                shown: dict[str, Json] = dict(file, nodeId=node_id, mediaType=media)  # pyright: ignore[reportUnknownArgumentType]
                if shown["type"] == "temp":
                    temporary = temporary or shown
                else:
                    saved = saved or shown
    return count, saved or temporary
