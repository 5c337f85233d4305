"""`sdclient` on the command line, against a server whose answers are written here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from fake_service import ENGINE, Call, Responses, Waiting, accepted, finished, image, progress, serving
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from sdclient.__main__ import main

if TYPE_CHECKING:
    from pathlib import Path

    from sdapi.v1.generation_pb2 import GenerateRequest

COMMAND = [sys.executable, "-m", "sdclient"]
WITHOUT_RICH = [
    sys.executable,
    "-c",
    "import sys; sys.modules['rich'] = None; from sdclient.__main__ import main; sys.exit(main())",
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands write into an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def images(request: GenerateRequest, call: Call) -> Responses:
    """As many images as asked for, with their seeds, or from seed 40 on."""
    yield accepted(request, queue_position=2)
    for step in range(5):
        yield progress(step, 4)
    count = request.image_count if request.HasField("image_count") else 1
    for index, seed in enumerate(request.seeds or range(40, 40 + count)):
        yield image(index, seed=seed, data=b"image %d" % index)
    yield finished()


def generate(*arguments: str) -> dict[str, Any]:
    """The fields of the request that `sdclient generate` sends for these arguments."""
    with serving(images) as service:
        assert main(["generate", "--server", service.target, *arguments]) == 0
    [request] = service.requests
    return {field.name: value for field, value in request.ListFields()}


def test_an_image_is_written_and_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate("a lake")
    assert (folder / "out.png").read_bytes() == b"image 0"
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("out.png  64x32  seed 40  ")
    assert line.endswith(" s")


@pytest.mark.parametrize(
    ("output", "names"),
    [
        ("lake.png", {"lake-0.png", "lake-1.png"}),
        ("{index}-of-2.png", {"0-of-2.png", "1-of-2.png"}),
        ("lake-{seed}.png", {"lake-40.png", "lake-41.png"}),
    ],
)
def test_several_images_have_several_names(folder: Path, output: str, names: set[str]) -> None:
    generate("a lake", "-n", "2", "-o", output)
    assert {path.name for path in folder.iterdir()} == names


def test_each_image_can_have_its_own_seed_and_name(folder: Path) -> None:
    request = generate("a lake", "--seeds", "7,0", "-o", "lake-{seed}.png")
    assert (list(request["seeds"]), "image_count" in request) == ([7, 0], False)
    assert {path.name for path in folder.iterdir()} == {"lake-7.png", "lake-0.png"}
    generate("a lake", "--seeds", "7,0", "-o", "boat.png")
    assert {path.name for path in folder.glob("boat*")} == {"boat-0.png", "boat-1.png"}


def test_noise_and_rescale_are_options_of_which_0_is_a_value() -> None:
    request = generate("a lake", "--eta", "0", "--churn", "2.5", "--guidance-rescale", "0.75")
    assert {name: request[name] for name in ("eta", "churn", "guidance_rescale")} == {
        "eta": 0,
        "churn": 2.5,
        "guidance_rescale": 0.75,
    }


def test_windows_and_tiling_are_options() -> None:
    request = generate("a lake", "--window", "0", "--tile-x")
    assert (request["windows"].HasField("size"), request["windows"].HasField("overlap")) == (True, False)
    assert (request["tile_x"], "tile_y" in request) == (True, False)
    assert generate("a lake", "--window-overlap", "64")["windows"].overlap == 64


def test_block_caching_is_an_option() -> None:
    assert generate("a lake", "--block-cache", "3")["block_cache"].interval == 3
    assert "block_cache" not in generate("a lake")


def test_what_is_not_said_is_not_sent() -> None:
    assert generate("a lake").keys() == {"prompts", "output"}


def test_flags_are_the_options_of_the_sdk() -> None:
    flags = "-W 384 -H 100 -s 7 -S 0 -n 2 -g 0 --sampler dpmpp_2m --schedule karras --blending composable --engine tiny"
    request = generate("a lake", "a boat", "-N", "trees", "-N", "fog", *flags.split())
    prompts = [(prompt.text, prompt.weight if prompt.HasField("weight") else None) for prompt in request["prompts"]]
    assert prompts == [("a lake", None), ("a boat", None), ("trees", -1), ("fog", -1)]
    del request["prompts"], request["output"]
    assert request == {
        "width": 384,
        "height": 100,
        "steps": 7,
        "seed": 0,
        "image_count": 2,
        "guidance_scale": 0,
        "sampler": 5,
        "schedule": 2,
        "blending": 2,
        "engine": "tiny",
    }


@pytest.mark.parametrize(
    ("output", "media_type"), [("a.png", "image/png"), ("a.webp", "image/webp"), ("a.JPG", "image/jpeg")]
)
def test_the_suffix_chooses_the_format(output: str, media_type: str) -> None:
    def answer(request: GenerateRequest, call: Call) -> Responses:
        response = image()
        response.image.media_type = request.output.media_type
        yield response
        yield finished()

    with serving(answer) as service:
        assert main(["generate", "a lake", "-o", output, "--quality", "80", "--server", service.target]) == 0
    assert service.requests[0].output.media_type == media_type
    assert service.requests[0].output.quality == 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["generate"], "the following arguments are required: PROMPT"),
        (["generate", "a lake", "-o", "lake.gif"], "lake.gif must end in one of .png, .webp, .jpg, .jpeg"),
        (["generate", "a lake", "-o", "no/lake.png"], "there is no folder no"),
        (["generate", "a lake", "--sampler", "eulr"], "invalid choice: 'eulr'"),
        (["generate", "a lake", "-S", "many"], "invalid int value: 'many'"),
        (["generate", "a lake", "--seeds", "1,x"], "1,x is no list of whole numbers such as 7,0,42"),
    ],
)
def test_wrong_usage_is_refused_before_any_call(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_an_invalid_request_lists_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(request: GenerateRequest, call: Call) -> Responses:
        violations = {"width": "3 is too small; at least 16", "steps": "0 is too small; at least 1"}.items()
        call.fail(
            grpc.StatusCode.INVALID_ARGUMENT,
            "width: 3 is too small; at least 16; steps: 0 is too small; at least 1",
            ErrorInfo(reason="INVALID_REQUEST", metadata={"request_id": "r1"}),
            BadRequest(
                field_violations=[BadRequest.FieldViolation(field=name, description=text) for name, text in violations]
            ),
        )

    with serving(answer) as service:
        assert main(["generate", "a lake", "-W", "3", "-s", "0", "--server", service.target]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "sdclient: the request is not valid",
        "  width: 3 is too small; at least 16",
        "  steps: 0 is too small; at least 1",
        "  (request r1)",
    ]


def test_a_failure_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(request: GenerateRequest, call: Call) -> Responses:
        call.fail(grpc.StatusCode.NOT_FOUND, "no engine 'x'; this server has tiny-landscape", ErrorInfo(reason="R"))

    with serving(answer) as service:
        assert main(["generate", "a lake", "--server", service.target]) == 1
    assert capsys.readouterr().err == "sdclient: no engine 'x'; this server has tiny-landscape\n"


def test_a_file_that_cannot_be_written_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "out.png").mkdir()
    with serving(images) as service:
        assert main(["generate", "a lake", "--server", service.target]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("sdclient: ")
    assert "out.png" in line


def test_json_reports_the_images_and_the_resolved_request(capsys: pytest.CaptureFixture[str]) -> None:
    generate("a lake", ":", "-N", "trees", "-n", "2", "-g", "7.1", "--json")
    report = json.loads(capsys.readouterr().out)
    assert [made["path"] for made in report["images"]] == ["out-0.png", "out-1.png"]
    assert [made["seed"] for made in report["images"]] == [40, 41]
    assert report["options"]["guidance_scale"] == 7.1
    assert report["options"]["output"] == {"media_type": "image/png", "quality": None, "metadata": None}
    assert report["prompts"][-1] == {"text": "trees", "weight": -1.0, "emphasis": []}
    assert report["prompt_usage"] == [{"tokens": tokens, "chunks": 1} for tokens in (2, 1, 1)]
    assert report["timings"]["total"] == 1.5
    assert report["usage"]["unet_rows"] == 40


def test_only_a_prompt_of_several_chunks_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    generate("a lake", "trees " * 100)
    assert "prompt 2: 100 tokens in 2 chunks" in capsys.readouterr().err
    generate("a lake")
    assert "chunk" not in capsys.readouterr().err


def test_engines_are_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with serving() as service:
        assert main(["engines", "--server", service.target]) == 0
    table = capsys.readouterr().out
    for text in (
        "tiny-landscape",
        "16 to 1024 px",
        "384x128, 20 steps, dpmpp_2m, karras",
        "euler, dpmpp_2m",
        "Apache-2.0",
    ):
        assert text in table


def test_engines_are_json_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as service:
        assert main(["engines", "--json", "--server", service.target]) == 0
    [engine] = json.loads(capsys.readouterr().out)
    assert engine["id"] == ENGINE.id
    assert engine["limits"]["max_steps"] == ENGINE.limits.max_steps
    assert engine["samplers"] == ["euler", "dpmpp_2m"]


def test_the_environment_names_the_server_and_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(images) as service:
        monkeypatch.setenv("SDCLIENT_SERVER", service.target)
        monkeypatch.setenv("SDCLIENT_API_KEY", "secret")
        assert main(["generate", "a lake"]) == 0
    assert service.metadata[0]["authorization"] == "Bearer secret"


def test_the_key_can_be_in_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDCLIENT_API_KEY", "another")
    (folder / "key").write_text("secret\n")
    with serving(images) as service:
        assert main(["generate", "a lake", "--server", service.target, "--api-key-file", "key"]) == 0
    assert service.metadata[0]["authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("flags", "environment", "problem"),
    [
        (["--tls", "nowhere.pem"], {}, "nowhere.pem"),
        ([], {"SDCLIENT_TLS": "nowhere.pem"}, "nowhere.pem"),
        (["--tls"], {"SDCLIENT_TLS_CERTIFICATE": "client.pem"}, "go together"),
        (["--tls-certificate", "client.pem", "--tls-private-key", "key.pem"], {}, "need --tls"),
        (["--api-key-file", "nowhere"], {}, "nowhere"),
    ],
)
def test_a_connection_that_cannot_be_made_is_one_clear_message(
    flags: list[str],
    environment: dict[str, str],
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["engines", *flags]) == 1
    assert problem in capsys.readouterr().err


def test_the_environment_can_say_that_there_is_tls(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SDCLIENT_TLS", "1")
    with serving(images) as service:
        assert main(["engines", "--server", service.target]) == 1
        assert "TLS handshake" in capsys.readouterr().err
        monkeypatch.setenv("SDCLIENT_TLS", "0")
        assert main(["engines", "--json", "--server", service.target]) == 0


def run(command: list[str], *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )


def test_a_terminal_sees_the_queue_and_the_steps_and_a_pipe_only_the_images() -> None:
    # FORCE_COLOR: rich then takes standard error for a terminal.
    with serving(images) as service:
        done = run(COMMAND, "generate", "a lake", "--server", service.target, FORCE_COLOR="1", COLUMNS="100")
        piped = run(COMMAND, "generate", "a lake", "--server", service.target)
    assert done.returncode == piped.returncode == 0
    assert "4/4" in done.stderr
    assert piped.stderr == ""
    assert done.stdout.startswith("out.png  64x32  seed 40")
    assert "4/4" not in done.stdout


def test_an_interrupt_cancels_the_work_on_the_server() -> None:
    answer = Waiting()
    with serving(answer) as service:
        command = [*COMMAND, "generate", "a lake", "--server", service.target]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert answer.started.wait(30)
            process.send_signal(signal.SIGINT)
            assert answer.left.wait(10)
            out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (out, err) == ("", "sdclient: cancelled\n")


def test_without_rich_images_are_made_and_the_table_says_what_to_install(folder: Path) -> None:
    with serving(images) as service:
        made = run(WITHOUT_RICH, "generate", "a lake", "--server", service.target)
        table = run(WITHOUT_RICH, "engines", "--server", service.target)
        listed = run(WITHOUT_RICH, "engines", "--json", "--server", service.target)
    assert (made.returncode, table.returncode, listed.returncode) == (0, 1, 0)
    assert (folder / "out.png").exists()
    assert made.stderr == "sdclient: no progress bar without rich: pip install 'sd-service[cli]'\n"
    assert table.stderr == "sdclient: the table needs rich: pip install 'sd-service[cli]', or use --json\n"


def test_open_opens_the_image(folder: Path) -> None:
    browser = folder / "browser.py"
    browser.write_text("import pathlib, sys; pathlib.Path('opened').write_text(sys.argv[1])")
    with serving(images) as service:
        done = run(
            COMMAND,
            *("generate", "a lake", "--open", "--server", service.target),
            BROWSER=f"{sys.executable} {browser} %s",
        )
    assert done.returncode == 0
    assert (folder / "opened").read_text() == (folder / "out.png").as_uri()


def test_flags_about_images_become_their_options(folder: Path) -> None:
    (folder / "lake.jpg").write_bytes(b"lake")
    (folder / "mask.png").write_bytes(b"mask")
    started = ["--init", "lake.jpg", "--strength", "0", "--fit", "contain", "--mask", "mask.png", "--feather", "0"]
    fields = generate("a house", *started, "--outpaint", "64,0,8,0")
    init_image, mask, outpaint = (fields[name] for name in ("init_image", "mask", "outpaint"))
    assert (init_image.data, init_image.HasField("strength"), init_image.fit) == (b"lake", True, 2)
    assert (mask.data, mask.HasField("feather")) == (b"mask", True)
    assert (outpaint.left, outpaint.right, outpaint.top, outpaint.bottom) == (64, 0, 8, 0)
    near = generate("a house", "--depth-map", "mask.png", "--noise-level", "0")
    assert (near["depth_map"].data, near["upscale"].HasField("noise_level")) == (b"mask", True)
    varied = generate("a lake", "--variation-strength", "0.25", "--variation-seed", "0")["variation"]
    assert (varied.strength, varied.HasField("seed")) == (0.25, True)
    assert not generate("a lake", "--two-pass")["two_pass"].ListFields()
    large = generate("a lake", "--two-pass-size", "128x96", "--two-pass-strength", "0.5")["two_pass"]
    assert (large.width, large.height, large.strength) == (128, 96, 0.5)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--strength", "0"], "--strength needs --init"),
        (["--mask", "mask.png"], "--mask needs --init"),
        (["--variation-seed", "1"], "--variation-seed needs --variation-strength"),
        (["--outpaint", "64"], "64 are no four whole numbers"),
        (["--two-pass-size", "128"], "128 is no size"),
    ],
)
def test_flags_about_images_that_cannot_be_are_wrong_usage(
    flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["generate", "a lake", *flags])
    assert caught.value.code == 2
    assert problem in capsys.readouterr().err


def test_the_report_of_an_image_that_was_started_from_another_is_json(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "lake.jpg").write_bytes(b"lake")
    generate("a house", "--init", "lake.jpg", "--json")
    options = json.loads(capsys.readouterr().out)["options"]
    assert options["init_image"] == {"strength": None, "fit": None, "sha256": None}
