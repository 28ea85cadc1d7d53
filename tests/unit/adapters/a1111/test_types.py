"""Each field that a real server describes is checked for its type, so that no job waits in vain for a 422."""

import json
from pathlib import Path
from typing import Any

import pytest

from gpulane.adapters.a1111.errors import Invalid
from gpulane.adapters.a1111.requests import RequestContext, recognize
from gpulane.core.model import JobId

SCHEMAS = {
    "txt2img": "StableDiffusionProcessingTxt2Img",
    "img2img": "StableDiffusionProcessingImg2Img",
    "extra-single-image": "ExtrasSingleImageRequest",
    "extra-batch-images": "ExtrasBatchImagesRequest",
    "interrogate": "InterrogateRequest",
}
WRONG: dict[str, object] = {
    "integer": "x",
    "number": "x",
    "boolean": "perhaps",
    "string": [1],
    "array": "x",
    "object": "x",
}


@pytest.mark.parametrize("endpoint", SCHEMAS)
def test_a_wrong_type_is_refused_at_once(endpoint: str, shared: Path) -> None:
    openapi = json.loads((shared / "recordings/a1111/openapi.json").read_text())
    properties: dict[str, Any] = openapi["components"]["schemas"][SCHEMAS[endpoint]]["properties"]
    context = RequestContext(job=JobId("job"))
    refused: list[object] = []
    for name, described in properties.items():
        body = {"init_images": ["x"], name: WRONG[described["type"]]}
        try:
            recognize(f"/sdapi/v1/{endpoint}", json.dumps(body).encode(), context)
        except Invalid as error:
            refused.append([p.loc for p in error.problems])
        else:
            refused.append([])
    assert refused == [[("body", name)] for name in properties]
