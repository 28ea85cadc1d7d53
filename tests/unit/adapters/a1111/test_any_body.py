"""Whatever a client sends, it is either a job whose body is sound, or a refusal in words."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from gpulane.adapters.a1111.catalogue import read_catalogue
from gpulane.adapters.a1111.errors import error_answer
from gpulane.adapters.a1111.requests import RequestContext, recognize
from gpulane.adapters.a1111.routes import JOB_POSTS, classify
from gpulane.adapters.base import Route
from gpulane.core.model import JobId
from gpulane.errors import ClientError
from tests.unit.adapters.a1111.samples import DOCUMENTS

CONTEXT = RequestContext(job=JobId("job"), catalogue=read_catalogue(DOCUMENTS))
NAMES = st.sampled_from(
    [
        "prompt",
        "steps",
        "width",
        "height",
        "batch_size",
        "n_iter",
        "sampler_name",
        "scheduler",
        "override_settings",
        "enable_hr",
        "hr_scale",
        "hr_upscaler",
        "alwayson_scripts",
        "script_name",
        "init_images",
        "denoising_strength",
        "infotext",
        "image",
        "imageList",
        "upscaling_resize",
        "upscaler_1",
        "resize_mode",
        "force_task_id",
        "refiner_checkpoint",
    ]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9)
)
VALUES = st.recursive(
    SCALARS | st.sampled_from(["Euler a", "Latent", "20"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=20), inner, max_size=3),
    max_leaves=6,
)
SETTINGS = st.dictionaries(
    st.sampled_from(["sd_model_checkpoint", "sd_vae", "forge_additional_modules"]), VALUES
)
BODIES = st.dictionaries(NAMES, VALUES | SETTINGS, max_size=6).map(lambda body: json.dumps(body).encode())


@given(path=st.sampled_from(sorted(JOB_POSTS)), body=BODIES | st.binary(max_size=30))
@settings(max_examples=300, deadline=None)
def test_a_job_or_a_refusal(path: str, body: bytes) -> None:
    try:
        found = recognize(path, body, CONTEXT)
    except ClientError as error:
        answer = error_answer(error)
        assert 400 <= answer.status <= 500 and isinstance(json.loads(answer.body), dict)
        return
    sent = json.loads(found.request.body)
    assert isinstance(sent, dict) and found.work.amount >= 1
    if found.kind in {"txt2img", "img2img"}:
        assert sent["force_task_id"] == "job"


@given(method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS"]), path=st.text(max_size=40))
@settings(max_examples=300, deadline=None)
def test_an_unknown_change_is_never_relayed(method: str, path: str) -> None:
    route = classify(method, "/" + path)
    if method in {"POST", "PUT", "DELETE"}:
        assert route is not Route.RELAY or path in {"login", "sdapi/v1/png-info"}
