"""The page and those who ask too much, ask too slowly, or ask for what is not theirs."""

import asyncio
import contextlib
import gc
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from app_models import BAD, GOOD, MAKE, ask, sample, served_by, write_log
from tokenizers import Regex, Tokenizer, pre_tokenizers
from visitors import (
    DRAW,
    Visitor,
    can_measure,
    connect,
    forget,
    memory,
    request,
    send,
    status,
)

gr = pytest.importorskip("gradio")

import fastapi  # noqa: E402
import uvicorn  # noqa: E402

import genkit.app  # noqa: E402
from genkit import cli  # noqa: E402
from genkit.app import (  # noqa: E402
    events,
    guard,
    jobs,
    runs,
    wire,
)
from genkit.app.model_index import ModelIndex  # noqa: E402

pytestmark = pytest.mark.slow

BLOCK = bytes(1 << 20)
PLACE = re.compile(r"Place (\d+) in the queue")
FEW = ["class_conditional", "one after the other", 0, 4, "dpm++", 5, 1.0]  # of images, and steps


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("language", "class_conditional", "training"):
        MAKE[name](folder / name)
    MAKE["language"](folder / "panics")
    tokenizer = Tokenizer.from_file(str(folder / "panics/tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a|a|aa)*$"), "isolated")
    tokenizer.save(str(folder / "panics/tokenizer.json"))
    with served_by([str(folder)]) as found:
        visitor = Visitor(found[0], "first")
        visitor.choose("class_conditional")  # all is imported
        yield found


@pytest.fixture(scope="module")
def address(page):
    return page[0]


# ---- requests


FRAMINGS = {
    "length": ["Content-Length: {size}"],
    "chunked": ["Transfer-Encoding: chunked"],
    "both": ["Content-Length: {size}", "Transfer-Encoding: chunked"],
    "both, small": ["Content-Length: 2", "Transfer-Encoding: chunked"],
    "none": [],
    "two lengths": ["Content-Length: 2", "Content-Length: {size}"],
}


@pytest.mark.slow
@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_large_request_takes_no_memory(page, framing):
    address, pid = page
    if not can_measure(pid):
        pytest.skip("the memory of a process cannot be measured here")
    count = 300
    headers = [header.format(size=count << 20) for header in FRAMINGS[framing]]
    block = BLOCK if "chunked" not in framing else b"%x\r\n%s\r\n" % (len(BLOCK), BLOCK)
    ask(f"{address}config")  # what comes with any request is not of this one
    forget(pid)
    before = memory(pid)
    with connect(address) as connection:
        send(connection, request(address, *headers) + block, 1)
        assert status(connection) in (400, 413)
        with contextlib.suppress(OSError):
            send(connection, block, count - 1)
    assert memory(pid) - before < 50 << 20
    assert ask(f"{address}config")[0] == 200


def test_a_refusal_is_read_by_whoever_first_sends_all(address):
    size = 4 * len(BLOCK)
    for _ in range(20):
        for headers, path, wanted in (
            ([f"Content-Length: {size}"], "gradio_api/run/refresh", 413),
            (["Content-Length: 3", "Content-Length: 4"], "gradio_api/run/refresh", 400),
            ([f"Content-Length: {size}", "Origin: http://x.example"], "config", 403),
            ([f"Content-Length: {size}"], "gradio_api/upload", 404),
            ([], "gradio_api/run/refresh", 413),
        ):
            with connect(address) as connection:
                send(connection, request(address, *headers, path=path) + BLOCK, 1)
                send(connection, BLOCK, 3)
                assert status(connection) == wanted


def test_what_decides_stands_once(address):
    host = address.removeprefix("http://").rstrip("/")
    body = b'{"data": ["training", "linear", ""]}'
    good = [f"Host: {host}", f"Origin: http://{host}", f"Content-Length: {len(body)}"]
    good += ["Content-Type: application/json", "Connection: close"]
    others = ["Host: x.example", "Origin: http://x.example", f"Content-Length: {len(body) + 1}"]
    for twice in (None, *good[:2], *others):
        for headers in ([*good, twice], [twice, *good]):
            with connect(address) as connection:
                send(connection, request(address, *filter(None, headers)) + body, 1)
                assert status(connection) == (400 if twice else 200), headers
    scope = {"headers": [(b"content-length", b"2")] * 2}
    with pytest.raises(guard.RefusedError, match="one header content-length"):
        guard._headers(scope)


def test_an_origin_is_of_the_pages_scheme_and_port(address):
    host = address.removeprefix("http://").rstrip("/")
    name = host.partition(":")[0]
    assert ask(f"{address}config", Origin=f"http://{host}")[0] == 200
    for origin in (f"https://{host}", f"http://{name}", f"http://{name}:1", "null", host, ""):
        assert ask(f"{address}config", Origin=origin)[0] == 403, origin
        # nor does a header say what the scheme is
        forwarded = {"X_Forwarded_Proto": "https", "X_Forwarded_For": "1.2.3.4"}
        assert ask(f"{address}config", Origin=origin, **forwarded)[0] == 403, origin


@contextlib.contextmanager
def wired(answer):
    """Serve an application behind the guard in a thread, on connections as the page's is."""
    config = uvicorn.Config(
        guard.Guard(answer, None, None), http=wire.LimitedProtocol, log_level=60
    )
    server = uvicorn.Server(config)
    with genkit.app._listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, args=[[listening]])
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(20)


async def fine(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"fine"})


@pytest.mark.slow
def test_whoever_is_slow_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(wire, "HEADERS", 0.3)
    monkeypatch.setattr(wire, "LINGER", 0.3)
    monkeypatch.setattr(guard, "BODY", 0.3)
    with wired(fine) as address:
        head = request(address, "Content-Length: 5")
        for sent, wanted in (
            (head[:-2], 408),  # of the headers
            (head, 408),
            (head + b"body", 408),
            (head + b"whole" + head[:9], 200),  # the answer to the first
        ):
            with connect(address) as connection:
                send(connection, sent, 1)
                assert status(connection) == wanted
        with connect(address) as connection:
            assert connection.recv(1) == b""  # silence is answered by silence
        with connect(address) as connection:  # a byte now and then does not help
            for byte in head * 100:
                try:
                    connection.sendall(bytes([byte]))
                except OSError:
                    break
                time.sleep(0.02)
            else:
                pytest.fail("the connection is still open")
        assert ask(address)[0] == 200


def test_whoever_does_not_read_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(wire, "STALLED", 0.3)
    ended = threading.Event()

    async def endless(scope, receive, send):
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while (await asyncio.wait([gone := asyncio.create_task(receive())], timeout=0))[1]:
                gone.cancel()
                await send({"type": "http.response.body", "body": BLOCK, "more_body": True})
                if scope[guard.HEARD]() is False:
                    break
            ended.set()

    with wired(endless) as address, connect(address) as connection:
        send(connection, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 1)
        assert ended.wait(20)


def test_connections_are_counted(monkeypatch):
    monkeypatch.setattr(wire, "CONNECTIONS", 3)
    with wired(fine) as address, contextlib.ExitStack() as opened:
        silent = [opened.enter_context(connect(address)) for _ in range(6)]
        for first in silent[:3]:
            with contextlib.suppress(ConnectionResetError):
                assert first.recv(1) == b""  # the oldest make room
        assert ask(address)[0] == 200


def test_what_is_no_request_is_refused(address):
    for sent in (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"\0" * 70_000):
        with connect(address) as connection:
            send(connection, sent, 1)
            assert status(connection) == 400
    with connect(address) as connection:  # not in the midst of one either
        send(connection, request(address, "Transfer-Encoding: chunked") + b"no length\r\n\r\n", 1)
        assert status(connection) in (400, 413)


# ---- jobs


def test_greedy_visitors_are_not_in_the_way(address):
    greedy = [Visitor(address, f"greedy{i}") for i in range(21)]
    try:
        for each in greedy:
            each.choose("class_conditional")
            assert each.join("draw", DRAW) == 200
            each.listen()
        last = Visitor(address, "last")
        last.choose("class_conditional")
        assert last.join("draw", FEW) == 200
        last.listen()
        assert "4 of 1 x 8 x 8" in last.wait()[0]
        call = {"data": ["language", "The ", 1.0], "session_hash": "last"}
        assert "nexts" in ask(f"{address}gradio_api/run/next_tokens", call)[1]
        assert not any(each.done for each in greedy)
    finally:
        for each in greedy:
            each.leave()


def test_work_is_within_a_budget_and_goes_with_its_visitor(address):
    visitor = Visitor(address, "leaving")
    visitor.choose("class_conditional")
    assert visitor.join("draw", [*DRAW[:-1], 2.0]) == 200  # twice the network a step
    visitor.listen()
    assert "images times steps: 128,000 are too much" in visitor.wait()[0]
    visitor.leave()
    visitor.done.clear()
    visitor.join("draw", DRAW)
    visitor.listen()
    more = [*DRAW[:5], 30, 1.0]  # too much beside the other
    visitor.join("draw", more)
    assert "images times steps: 1,920 are too much" in visitor.wait()[0]
    visitor.leave()
    time.sleep(jobs.GRACE + 1)
    visitor.done.clear()
    visitor.join("draw", more)
    visitor.listen()
    assert "64 of 1 x 8 x 8" in visitor.wait()[0]
    visitor.leave()


def test_a_panic_is_a_line(address):
    text = "a" * 30 + "b"
    call = {"data": ["panics", text, 1.0]}
    code, found, _ = ask(f"{address}gradio_api/run/next_tokens", call)
    assert code == 200 and "problem" in found and "its tokenizer cannot read" in found
    visitor = Visitor(address, "panics")
    assert visitor.join("write", ["panics", text, "greedy", 1.0, 5, None, 1.0, 0, 4]) == 200
    visitor.listen()
    assert "its tokenizer cannot read" in visitor.wait()[0]
    visitor.leave()
    assert ask(f"{address}config")[0] == 200


def test_whatever_a_job_raises_ends_the_job_alone(capsys):
    scope = {"type": "http", "path": "/gradio_api/run/x", "client": ("1.2.3.4", 5)}
    scope |= {guard.HEARD: lambda: True}
    asked = gr.Request(request=fastapi.Request(scope))
    for error in (SystemExit(3), KeyboardInterrupt(), MemoryError("a\nb"), GeneratorExit()):

        def fail(index, error=error):
            raise error

        line, other = events.make_event(fail, ModelIndex([]), ["other"])(asked)
        assert re.fullmatch(rf'<p class="problem" .*>{type(error).__name__}: .*</p>', line)
        assert "\n" not in line and other == "other"
    assert "MemoryError" in capsys.readouterr().err
    assert events.make_event(lambda index: "fine", ModelIndex([]))(asked) == "fine"


def always() -> bool:
    return True


def spin(queue, visitor, order, name, steps, heard=always, tell=jobs.no_one) -> threading.Thread:
    """Start a job that takes some steps of three hundredths of a second."""

    def do():
        try:
            with queue.job(visitor, heard, name, tell):
                for _ in range(steps):
                    time.sleep(0.03)
                    queue.pause()
            order.append(name)
        except (ValueError, jobs.DroppedError) as error:
            order.append(str(error))

    thread = threading.Thread(target=do)
    thread.start()
    return thread


def test_whoever_had_least_goes_first():
    queue, order = jobs.JobQueue(), []
    long = [spin(queue, ("home", f"long{i}"), order, f"long{i}", 40) for i in range(3)]
    time.sleep(0.5)
    short = [spin(queue, ("home", "short"), order, "short", 3)]
    away = [spin(queue, ("away", "any"), order, "away", 3)]
    for thread in (*long, *short, *away):
        thread.join()
    assert order[:2] == ["away", "short"] and len(order) == 5


def test_a_job_that_makes_no_step_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(jobs, "PATIENCE", 0.1)
    queue, order, stuck = jobs.JobQueue(), [], threading.Event()

    def hang():
        with queue.job(("home", "hangs"), always):
            stuck.wait(20)
            queue.pause()
        order.append("hangs")

    thread = threading.Thread(target=hang)
    thread.start()
    time.sleep(0.2)
    spin(queue, ("home", "other"), order, "other", 3).join()
    stuck.set()
    thread.join()
    assert order == ["other", "hangs"]


def test_a_job_that_nobody_hears_ends(monkeypatch):
    monkeypatch.setattr(jobs, "GRACE", 0.2)
    queue, order, visitor = jobs.JobQueue(), [], ("home", "one")
    spin(queue, visitor, order, "done", 3, lambda: queue.is_heard(visitor)).join()
    with queue.listening(visitor):
        spin(queue, visitor, order, "done", 3, lambda: queue.is_heard(visitor)).join()
        left = spin(queue, visitor, order, "done", 10**6, lambda: queue.is_heard(visitor))
    left.join(20)
    assert order == ["stopped, as nobody listened", "done", "stopped, as nobody listened"]


def test_stop_ends_jobs_of_that_visitor_and_name():
    queue, order = jobs.JobQueue(), []

    def hang(visitor, name):
        try:
            with queue.job(visitor, always, name):
                while True:
                    queue.pause()
        except jobs.DroppedError as error:
            order.append((visitor, name, str(error)))

    mine, other = ("home", "one"), ("home", "two")
    asked = [(mine, "write"), (mine, "draw"), (other, "write")]
    threads = [threading.Thread(target=hang, args=each) for each in asked]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    queue.stop(mine, "write")
    threads[0].join(20)
    assert order == [(mine, "write", "stopped")]
    queue.stop(mine, "draw")
    queue.stop(other, "write")
    for thread in threads:
        thread.join(20)
    assert len(order) == 3


def test_whoever_has_most_gives_way(monkeypatch):
    monkeypatch.setattr(jobs, "ROOM", 4)
    monkeypatch.setattr(jobs, "SHARE", 3)
    queue, order, hears = jobs.JobQueue(), [], threading.Event()
    hears.set()

    def begin(address, session):
        thread = spin(queue, (address, session), order, "done", 10**6, hears.is_set)
        time.sleep(0.05)
        return thread

    started = [begin("home", "one") for _ in range(4)]
    assert len(order) == 1 and order[0].startswith("3 of your requests")
    started += [begin("home", "two"), begin("away", "one")]  # the second takes the room of a third
    assert len(order) == 2 and order[1].startswith("stopped, as others wait")
    started += [begin("home", "three"), begin("home", "four")]  # changing names brings nothing
    assert order[2:] == [order[1], "this page has too much to do; try again in a while"]
    monkeypatch.setattr(jobs, "GRACE", -1.0)
    hears.clear()
    for thread in started:
        thread.join(20)
    assert order[4:] == ["stopped, as nobody listened"] * 4


def test_places_in_the_queue_are_told(monkeypatch):
    monkeypatch.setattr(jobs, "ROOM", 2)
    monkeypatch.setattr(jobs, "LINE", 3)
    queue, order = jobs.JobQueue(), []
    told: dict[str, list[str]] = {name: [] for name in "abcdef"}

    def begin(name, steps=3):
        thread = spin(queue, ("home", name), order, name, steps, always, told[name].append)
        time.sleep(0.05)
        return thread

    started = [begin("a", 60), begin("b", 10**6)]
    started += [begin(name) for name in "cdef"]
    assert [told[name] for name in "ab"] == [[], []]
    assert [told[name] for name in "cde"] == [[f"Place {i} in the queue"] for i in (1, 2, 3)]
    assert order == ["this page has too much to do; try again in a while"] and not told["f"]
    for thread in (started[0], *started[2:]):
        thread.join(60)
    assert order[1:] == ["a", "c", "d", "e"]
    assert told["e"][0] == "Place 3 in the queue" and told["e"][-1] == "It is your turn"
    queue.stop(("home", "b"), "b")
    started[1].join(20)
    assert order[-1] == "stopped"


def test_a_visitor_who_computes_lets_others_go_first(monkeypatch):
    monkeypatch.setattr(jobs, "ROOM", 2)
    queue, order, told = jobs.JobQueue(), [], []
    started = []
    for session, name, steps in (
        ("one", "long", 10**6),
        ("two", "first", 40),
        ("one", "second", 3),  # of somebody who has a job inside
        ("three", "other", 3),
    ):
        started.append(spin(queue, ("home", session), order, name, steps, always, told.append))
        time.sleep(0.05)
    for thread in started[1:]:
        thread.join(60)
    assert order == ["first", "other", "second"]
    queue.stop(("home", "one"), "long")
    started[0].join(20)


def test_two_hundred_visitors_at_once_are_served_and_see_their_places(address):
    visitors = [Visitor(address, f"crowd{i}") for i in range(200)]
    try:
        with ThreadPoolExecutor(len(visitors)) as threads:
            list(threads.map(ask_for_few, visitors))
        outcomes = [visitor.wait(seconds=500)[0] for visitor in visitors]
        assert {text[:200] for text in outcomes if "4 of 1 x 8 x 8" not in text} == set()
        places = {int(n) for each in visitors for n in PLACE.findall("".join(each.states))}
        assert 1 in places
    finally:
        for visitor in visitors:
            visitor.leave()


def ask_for_few(visitor: Visitor) -> None:
    assert visitor.join("draw", FEW) == 200
    visitor.listen()


# ---- runs


def shown(folder) -> str:
    """What the page shows of a run, or why not, found in a time that no pipe makes longer."""
    with ThreadPoolExecutor() as thread:
        try:
            return thread.submit(runs.show_run, folder, False).result(timeout=20)
        except ValueError as error:
            return str(error)


@pytest.fixture
def run(tmp_path):
    MAKE["training"](tmp_path / "run")
    (tmp_path / "secret").write_text("secret")
    return tmp_path / "run"


def test_odd_samples_are_passed_over(run):
    (run / "samples/step-00000050.md").symlink_to("../../secret")
    os.mkfifo(run / "samples/step-00000060.md")
    os.mkfifo(run / "samples/step-00000061.png")
    (run / "samples/step-00000070.md").mkdir()
    names = [
        "step-9 (copy).md",
        "step-.md",
        "step-x.md",
        "step-1e9.md",
        "step-²9.md",
        "step-99.txt",
    ]
    names += ["step--99.md", "step-00000099.md.swp", f"step-{'9' * 100}.md", ".md"]
    for name in names:
        (run / "samples" / name).write_text("odd")
    found = shown(run)
    assert "the first text" in found and "Samples of step 30" in found
    assert "secret" not in found and "odd" not in found
    sample(run, 41, "the second text")
    assert "the second text" in shown(run)


def test_links_of_a_run_are_not_followed(run):
    for name in ("samples", "loss.png", "metrics.jsonl"):
        if (run / name).exists():
            (run / name).rename(run.parent / name)
        (run.parent / "loss.png").write_bytes(b"secret")
        (run / name).symlink_to(run.parent / name)
        found = shown(run)
        assert (
            name == "samples"
            or f"{run.name}/{name} is a link that leads out of its folder" in found
        )
        assert "first text" not in found and "data:image" not in found
        (run / name).unlink()


@pytest.mark.parametrize("name", ["metrics.jsonl", "loss.png", "baseline.json", "run.json"])
def test_pipes_of_a_run_are_not_waited_for(tmp_path, name):
    folder = tmp_path / "game"
    MAKE["game"](folder)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    found = shown(folder)
    assert f"{folder.name}/{name} is not a regular file" in found


def test_a_damaged_log_is_read_as_far_as_it_goes(tmp_path):
    lines = ["3", "[]", '"x"', "null", "{}", '{"step": "1"}', '{"step": true}', '{"step": -1}', "{"]
    lines += ["[" * 100_000, '{"step": 1e999}', '{"step": 1, "loss": 1e999, "x": "y", "z": [1]}']
    lines += ['{"step": 2, "loss": 10000000000000000000000000000000000000000, "seconds": null}']
    lines += [
        '{"step": 3, "loss": 1, "coverage": 0.5}',
        '{"step": 4, "loss": null}',
        "\0",
        "\udcff",
    ]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    log = runs.read_log(tmp_path)
    assert log == [
        {"step": 1},
        {"step": 2, "seconds": None},
        {"step": 3, "loss": 1, "coverage": 0.5},
        {"step": 4, "loss": None},
    ]
    assert "step 4: a figure is not finite" in runs.show_run(tmp_path, True)


def test_damaged_settings_of_a_run_are_named(tmp_path):
    write_log(tmp_path, [{"step": 1} | GOOD, {"step": 2} | BAD])
    good = ['{"settings": {"loss": 3}}', '{"settings": []}', "{}", '{"coverage": "x"}']
    for text in (*good, "", "[]", "{", '"x"', "[" * 100_000):
        for name in ("run.json", "baseline.json"):
            (tmp_path / name).write_text(text)
            found = "".join(runs.find_troubles(tmp_path, runs.read_log(tmp_path)))
            assert (f"{name} is damaged" in found) == (text not in good and text != "")
            (tmp_path / name).unlink()


def test_files_of_any_size_are_not_read(run, monkeypatch):
    monkeypatch.setattr(runs, "LOG", 100)
    with pytest.raises(ValueError, match=r"metrics.jsonl has more than 100 bytes"):
        runs.show_run(run, False)


# ---- the token


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # gradio leaves event loops open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_token_is_in_no_command_line(tmp_path, monkeypatch, capsys):
    served = []
    monkeypatch.setattr(genkit.app._Server, "run", lambda server, sockets: served.append(server))

    def token(*words: str) -> str | None:
        cli.main(["app", str(tmp_path), "--port", "0", *words])
        return served[-1].config.app.token

    write_log(tmp_path / "run", [{"step": 1, "loss": 1.0}])
    (tmp_path / "token").write_text("of-a-file\n")
    monkeypatch.delenv("GENKIT_TOKEN", raising=False)
    assert token() is None
    monkeypatch.setenv("GENKIT_TOKEN", "of-the-environment")
    assert token() == "of-the-environment"
    assert token("--token_file", str(tmp_path / "token")) == "of-a-file"
    with pytest.raises(SystemExit):
        token("--token", "secret")
    for name, text in (("gone", None), ("empty", b""), ("two", b"a\nb"), ("bytes", b"\xff")):
        if text is not None:
            (tmp_path / name).write_bytes(text)
        with pytest.raises(SystemExit):
            token("--token_file", str(tmp_path / name))
        assert re.search(r"error: .*token", capsys.readouterr().err)
    monkeypatch.setenv("GENKIT_TOKEN", "")  # not the same as none
    with pytest.raises(SystemExit):
        token()
    with pytest.raises(SystemExit):
        cli.main(["app", "--help"])
    text = capsys.readouterr().out
    assert "GENKIT_TOKEN" in text and "--token-file" in text
    gc.collect()  # of those loops, while they are allowed
