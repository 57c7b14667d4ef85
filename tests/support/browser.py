"""A headless Chromium that opens the page of a running server."""

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

NEEDED = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
if importlib.util.find_spec("selenium") is None:
    NEEDED.append("selenium")
MISSING = (
    f"not installed: {', '.join(NEEDED)} (Debian: apt install chromium chromium-driver; pip install selenium)" if NEEDED else ""
)
"""The reason to skip tests that need a browser; empty if they can run."""
SECONDS = 30
CTRL, ENTER, ESCAPE, TAB = "\ue009", "\ue007", "\ue00c", "\ue004"
RIGHT, LEFT, HOME, END = "\ue014", "\ue012", "\ue011", "\ue010"


class Page:
    """The page in a browser, with short ways to read and use it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, url: str, tab: str = "write") -> None:
        """Open the page of a server afresh, at one of its tools."""
        self.driver.get("about:blank")
        self.driver.get(f"{url}/#{tab}")
        self.run("sessionStorage.clear(); localStorage.clear();")
        self.driver.get("about:blank")
        self.driver.get(f"{url}/#{tab}")
        self.until(lambda: "Asking" not in self.text("#models"))

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript in the page and return its result."""
        return self.driver.execute_script(script, *arguments)

    def module(self, name: str, script: str, *arguments: Any) -> Any:
        """Run JavaScript with a module of the page as `m` and the arguments as `a`; return its result."""
        whole = f"const a = [...arguments], done = a.pop(); import('/page/{name}').then((m) => {{ {script} }})"
        found = self.driver.execute_async_script(
            f"{whole}.then((value) => done({{value}}), (e) => done({{error: e.message}}))", *arguments
        )
        assert "error" not in found, found
        return found["value"]

    def one(self, selector: str) -> Any:
        """Return the first element that a CSS selector finds."""
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        """Return all elements that a CSS selector finds."""
        return list(self.driver.find_elements("css selector", selector))

    def text(self, selector: str) -> str:
        """Return the whole text of an element, as it stands in the document."""
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def fill(self, selector: str, text: str) -> None:
        """Replace the text of a field by typing."""
        field = self.one(selector)
        field.clear()
        field.send_keys(text)

    def click(self, selector: str) -> None:
        """Click an element."""
        self.run("arguments[0].scrollIntoView({block: 'center'})", self.one(selector))
        self.one(selector).click()

    def press(self, *keys: str) -> None:
        """Send keys, together, to the element that has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def slide(self, value: float) -> None:
        """Move the slider of lambda."""
        self.run(
            "const s = document.getElementById('weight'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))", value
        )

    def write(self, suffix: str = " is the capital of France.", **options: object) -> None:
        """Fill the form of `Write before` and start it with the keyboard."""
        self.fill("#suffix", suffix)
        for name, value in options.items():
            self.fill(f"#write-form [name={name}]", str(value))
        self.one("#suffix").send_keys(CTRL, ENTER)

    def is_idle(self, panel: str) -> bool:
        """Return True if no request of a panel runs."""
        return not self.one(f"#{panel}-stop").is_enabled()

    def score(self, prompt: str, answers: list[str]) -> None:
        """Type a prompt, joined to candidates as it is, and candidates; rank them and wait until the table is complete."""
        self.run("document.getElementById('separator').value = ''")
        self.fill("#prompt", prompt)
        self.click("#clear-candidates")
        for _ in answers[2:]:
            self.click("#add-candidate")
        for field, answer in zip(self.all("#candidates textarea"), answers, strict=True):
            field.send_keys(answer)
        self.one("#prompt").send_keys(CTRL, ENTER)
        self.until(lambda: self.is_idle("rank"))

    def order(self) -> list[int]:
        """Return the positions of the candidates in the table."""
        return [int(row.get_attribute("data-position")) for row in self.all("#ranked tbody tr")]

    def problems(self) -> list[str]:
        """Return the messages of all visible mistakes."""
        return [element.text for element in self.all(".problem") if element.is_displayed()]

    def problem_of(self, selector: str) -> str:
        """Return the message that belongs to a field, which must be marked as invalid."""
        name = self.one(selector).get_attribute("aria-errormessage")
        assert self.one(selector).get_attribute("aria-invalid") == "true"
        return str(self.one(f"#{name}").text)

    def until(self, condition: Callable[[], Any], seconds: float = SECONDS) -> Any:
        """Wait until a condition holds and return its value."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds, 0.05).until(lambda _: condition())

    def complaints(self) -> list[str]:
        """Return what the browser complained about since the last call, but for responses with an error's status."""
        entries = self.driver.get_log("browser")
        return [one["message"] for one in entries if "Failed to load resource" not in one["message"]]


@contextmanager
def chromium(width: int = 1100, height: int = 1000) -> Iterator[Page]:
    """Run a headless Chromium for the block."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    size = f"--window-size={width},{height}"
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", size):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(SECONDS)
    try:
        yield Page(driver)
    finally:
        driver.quit()
