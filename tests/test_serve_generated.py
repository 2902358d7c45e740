"""A client that openapi-python-client makes of the endpoint's OpenAPI, asking a running endpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from base64 import b64encode
from collections.abc import Iterator
from importlib import import_module
from io import BytesIO
from pathlib import Path
from types import ModuleType

import httpx2 as httpx
import pytest

from raycap.serve.config import ServeConfig
from tests.serving import picture, running, small_captioner

PACKAGE = "generated_raycap_client"
KEY = "secret-of-ana"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An endpoint that asks for a key."""
    keys_file = tmp_path_factory.mktemp("keys") / "keys"
    keys_file.write_text(f"ana {KEY}\n")
    with running(ServeConfig(keys_file=str(keys_file)), small_captioner()) as address:
        yield address.removesuffix("/")


@pytest.fixture(scope="module")
def generated(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The client's package."""
    folder = tmp_path_factory.mktemp("generated")
    (folder / "openapi.json").write_text(httpx.get(f"{address}/openapi.json").text)
    scripts = sysconfig.get_path("scripts")  # it formats what it made with the ruff that is on the path
    subprocess.run(
        [
            *(f"{scripts}/openapi-python-client", "generate", "--path", "openapi.json"),
            *("--output-path", PACKAGE, "--meta", "none"),
        ],
        cwd=folder,
        env=os.environ | {"PATH": f"{scripts}:{os.environ['PATH']}"},
        check=True,
        capture_output=True,
    )
    sys.path.insert(0, str(folder))
    yield import_module(PACKAGE)
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]


def part(name: str) -> ModuleType:
    """A module of the generated package."""
    return import_module(f"{PACKAGE}.{name}")


def test_functions_have_the_names_of_what_they_ask(generated: ModuleType) -> None:
    files = Path(str(generated.__file__)).parent.glob("api/*/*.py")
    assert {path.stem for path in files} - {"__init__"} == {
        *("caption", "infer", "live", "ready", "server", "metadata", "model_ready", "healthz", "prometheus")
    }


@pytest.mark.parametrize("form", ["json", "form", "file"])
def test_each_kind_of_body_is_captioned(generated: ModuleType, address: str, form: str) -> None:
    models, types = part("models"), part("types")
    photo = types.File(BytesIO(picture()), file_name="a.jpg", mime_type="image/jpeg")
    bodies = {
        "json": lambda: models.CaptionRequest(
            [models.Base64Image(b64encode(picture()).decode())], models.Options(beam_size=2)
        ),
        "form": lambda: models.CaptionFilesBody([photo], beam_size=2),
        "file": lambda: types.File(BytesIO(picture())),
    }
    with generated.AuthenticatedClient(address, KEY, raise_on_unexpected_status=True, timeout=60) as client:
        answer = part("api.captions.caption").sync_detailed(client=client, body=bodies[form](), beam_size=2)
    assert answer.status_code == 200, answer.content
    (result,) = answer.parsed.results
    assert isinstance(result, models.Captioned)
    assert result.caption == json.loads(answer.content)["results"][0]["caption"]


def test_the_open_inference_protocol_is_typed(generated: ModuleType, address: str) -> None:
    models = part("models")
    tensor = models.InputTensor("image", [1], "BYTES", data=[b64encode(picture()).decode()])
    with generated.AuthenticatedClient(address, KEY, raise_on_unexpected_status=True, timeout=60) as client:
        answer = part("api.open_inference_protocol_v_2.infer").sync_detailed(
            "default", client=client, body=models.InferRequest([tensor])
        )
    assert answer.status_code == 200, answer.content
    caption, log_prob = answer.parsed.outputs
    assert (caption.name, caption.shape, len(caption.data), log_prob.datatype) == ("caption", [1], 1, "FP32")


@pytest.mark.parametrize(("key", "status"), [(KEY, 422), ("wrong", 401)])
def test_errors_are_problems(generated: ModuleType, address: str, key: str, status: int) -> None:
    body = part("models").CaptionRequest([part("models").Base64Image("!")])
    with generated.AuthenticatedClient(address, key, timeout=60) as client:
        answer = part("api.captions.caption").sync_detailed(client=client, body=body)
    assert isinstance(answer.parsed, part("models").ProblemDetails)
    assert answer.parsed.status == answer.status_code == status
