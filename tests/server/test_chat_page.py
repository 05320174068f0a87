"""The chat page in a real browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from live_server import scripted_model, serving, wait_until

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
pytestmark = pytest.mark.skipif(not os.path.exists(CHROMIUM), reason="chromium is not installed")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]
ATTACK = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@contextmanager
def page_of(browser: Any, reply: str, context: int = 4096, **options: Any) -> Iterator[Any]:
    """The page over a model that says `reply`; fails on any script error or CSP violation."""
    with serving(scripted_model(reply, context), **options) as live:
        page = browser.new_page()
        page.set_default_timeout(60_000)
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text)
                if "Content Security Policy" in message.text else None)
        page.live = live
        page.goto(f"{live.url}/")
        if "api_key" not in options:
            page.locator("#model", has_text="tiny").wait_for()
        yield page
        page.close()
        assert problems == []


def send(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send", exact=True).click()


def finished(page: Any) -> None:
    page.wait_for_selector("#log[aria-busy=false]")


def test_streams_an_answer_with_reasoning_and_keeps_it(browser: Any) -> None:
    reply = ("<think>count them</think>There are **twelve** `steps`:\n\n- one\n- two\n\n"
             "```py\nx<1\n```")
    with page_of(browser, reply) as page:
        send(page, "How many?")
        page.get_by_role("button", name="Stop the answer").wait_for()
        finished(page)
        answer = page.locator("article.assistant")
        assert answer.locator("strong").inner_text() == "twelve"
        assert answer.locator("li").all_inner_texts() == ["one", "two"]
        assert answer.locator("pre").inner_text() == "x<1"
        assert "tokens/s" in answer.locator(".foot").inner_text()
        assert not answer.locator(".thought").is_visible()
        answer.get_by_text("Reasoning").click()
        assert answer.locator(".thought").inner_text() == "count them"
        assert "/ 4,096" in page.locator("#filled").inner_text()
        page.reload()
        page.wait_for_selector("article.assistant strong")
        assert page.locator("article.user").inner_text().startswith("How many?")
        page.get_by_role("button", name="New chat").click()
        assert page.locator("article").count() == 0
        page.get_by_role("button", name="How many?").click()
        assert page.locator("article").count() == 2


def test_html_from_model_and_user_stays_text(browser: Any) -> None:
    with page_of(browser, f"{ATTACK}\n\n```\n{ATTACK}\n```\n- {ATTACK}") as page:
        send(page, ATTACK)
        finished(page)
        assert page.locator("article img, article script").count() == 0
        assert page.locator("article.user .text").inner_text() == ATTACK
        assert ATTACK in page.locator("article.assistant .text").inner_text()
        assert "owned" not in page.title()
        policy = httpx.get(page.live.url).headers["content-security-policy"]
        assert "unsafe" not in policy and "default-src 'none'" in policy


def test_stop_really_stops(browser: Any) -> None:
    with page_of(browser, "steps " * 4000, context=20_000) as page:
        network = page.live.model.network
        send(page, "Go on")
        page.locator(".assistant .text", has_text="steps steps steps").wait_for()
        page.get_by_role("button", name="Stop the answer").click()
        finished(page)
        assert "Stopped" in page.locator("article.assistant .foot").inner_text()
        assert "steps steps" in page.locator("article.assistant .text").inner_text()
        seen: list[int] = []

        def settled() -> bool:
            seen.append(network.calls)
            return len(seen) > 50 and seen[-1] == seen[-50]

        wait_until(settled)
        assert network.calls < 3900


def test_edit_and_regenerate(browser: Any) -> None:
    with page_of(browser, "a short answer") as page:
        send(page, "first")
        finished(page)
        page.get_by_role("button", name="Regenerate").click()
        finished(page)
        assert page.locator("article").count() == 2
        page.locator("article.user").get_by_role("button", name="Edit").click()
        page.get_by_label("Edit the message").fill("second")
        page.locator(".editor").get_by_role("button", name="Send").click()
        finished(page)
        assert page.locator("article.user .text").all_inner_texts() == ["second"]
        assert page.locator("article.assistant .text").inner_text() == "a short answer"


def test_too_long_a_prompt_is_shown_and_nothing_is_lost(browser: Any) -> None:
    with page_of(browser, "fine", context=64) as page:
        send(page, "many steps " * 60)
        alert = page.get_by_role("alert")
        alert.wait_for()
        assert "64 tokens" in alert.inner_text()
        assert page.get_by_label("Message", exact=True).input_value().startswith("many steps")
        assert page.locator("article").count() == 0
        send(page, "hi")
        finished(page)
        assert not alert.is_visible()
        assert page.locator("article.assistant .text").inner_text() == "fine"


def test_settings_reach_the_server_and_a_key_is_asked_for(browser: Any) -> None:
    with page_of(browser, "one two three four five six seven", api_key="sesame") as page:
        page.get_by_label("API key").wait_for()
        page.get_by_label("API key").fill("sesame")
        page.get_by_label("Max tokens").fill("3")
        page.get_by_label("System prompt").fill("Be brief.")
        page.get_by_role("button", name="Done").click()
        page.locator("#model", has_text="tiny").wait_for()
        with page.expect_request("**/v1/chat/completions") as sent:
            send(page, "hi")
        assert sent.value.post_data_json["max_tokens"] == 3
        assert sent.value.post_data_json["messages"][0] == {"role": "system",
                                                            "content": "Be brief."}
        finished(page)
        assert "Cut off" in page.locator("article.assistant .foot").inner_text()


def test_works_under_a_path_of_a_proxy(browser: Any) -> None:
    with page_of(browser, "Hello from below.", prefix="/models/chat") as page:
        send(page, "Hi")
        finished(page)
        assert page.locator(".assistant .text").inner_text() == "Hello from below."
