"""`python -m tests.browser DIRECTORY`: look at the status page in Debian's chromium, on a desktop and a phone.

Needs `apt-get install chromium` and `pip install -e '.[browser]'`. It writes screenshots into the directory, and fails
where the console has an error, axe-core finds a serious fault, the page asks another server, is wider than its window,
or cannot be used by the keyboard.
"""

import asyncio
import sys
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import uvloop
from playwright.async_api import Browser, Page, async_playwright

from tests.browser.scene import played

CHROMIUM = "/usr/bin/chromium"
WINDOWS = {"desktop": (1400, 900), "phone": (390, 844)}
PATIENCE_MS = 120_000
SETTLES_S = 25  # until the minute has something to show


async def look(to: Path) -> list[str]:
    """Take the pictures; return what is wrong with the page."""
    found: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        async with played(Path(directory)) as server, async_playwright() as playwright:
            browser = await playwright.chromium.launch(
                executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
            )
            await asyncio.sleep(SETTLES_S)
            for window in WINDOWS:
                for scheme in ("light", "dark"):
                    found += await look_once(browser, f"http://{server.admin_address}", window, scheme, to)
            await browser.close()
    return found


async def look_once(browser: Browser, url: str, window: str, scheme: Any, to: Path) -> list[str]:
    width, height = WINDOWS[window]
    viewport: Any = {"width": width, "height": height}
    context = await browser.new_context(viewport=viewport, color_scheme=scheme, bypass_csp=False)
    context.set_default_timeout(PATIENCE_MS)
    page = await context.new_page()
    found: list[str] = []
    page.on("console", lambda message: found.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: found.append(f"page error: {error}"))
    page.on("request", lambda request: found.extend([] if request.url.startswith((url, "data:")) else [request.url]))
    await page.goto(f"{url}/status")
    await page.wait_for_selector("#failures table")
    await page.screenshot(path=to / f"{window}-{scheme}.png", full_page=True)
    if await page.evaluate("document.documentElement.scrollWidth > innerWidth"):
        found.append("wider than its window")
    found += [f"keyboard: {fault}" async for fault in use_keyboard(page)]
    await context.close()
    return [f"{window} {scheme}: {each}" for each in [*found, *await faults_by_axe(browser, url, viewport, scheme)]]


async def use_keyboard(page: Page) -> Any:
    """Yield what the keyboard alone does not do."""
    await page.keyboard.press("Tab")
    if await page.evaluate("document.activeElement.className") != "skip":
        yield "the first stop is not the skip link"
    stops = []
    for _ in range(8):
        await page.keyboard.press("Tab")
        stops.append(await page.evaluate("document.activeElement.textContent"))
    if "Pause" not in stops:
        yield f"Pause is not among {stops}"
    await page.focus("#pause")
    await page.keyboard.press("Enter")
    if await page.get_attribute("#pause", "aria-pressed") != "true":
        yield "Enter does not press Pause"


async def faults_by_axe(browser: Browser, url: str, viewport: Any, scheme: Any) -> Iterator[str]:
    """Return what axe-core has against the page, from moderate on; its script is let past the page's policy."""
    context = await browser.new_context(viewport=viewport, color_scheme=scheme, bypass_csp=True)
    context.set_default_timeout(PATIENCE_MS)
    page = await context.new_page()
    await page.goto(f"{url}/status")
    await page.wait_for_selector("#failures table")
    await page.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text())
    faults = (await page.evaluate("axe.run()"))["violations"]
    await context.close()
    return (f"axe: {each['id']} ({each['impact']}) {each['nodes'][0]['html']}" for each in faults)


def main() -> int:
    to = Path(sys.argv[1])
    to.mkdir(parents=True, exist_ok=True)
    found = uvloop.run(look(to))
    print("\n".join(found) or f"nothing is wrong; pictures in {to}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
