"""The live page in a real Chromium: mouse, keyboard, phone, hostile prompts.

    pip install -e ".[serve]" playwright
    python -m tests.browser.check --out screenshots \\
        [--model emoji]

Needs a chromium of the system; writes screenshots and says what it saw. Fails
with an assertion where the page does not do what it promises.
"""

import argparse
import pathlib
import shutil

from playwright.sync_api import expect, sync_playwright

from tests.browser import serve

HOSTILE = '<img src=x onerror="window.owned=1"><script>owned=1</script>'
DONE = 180_000  # ms, with compiling on a busy machine
PHONE = {"width": 390, "height": 844}


def wait_until_done(page):
  """Waits for the image, then for the end of the replay."""
  expect(page.locator("#status")).to_contain_text("Done", timeout=DONE)
  page.wait_for_timeout(3000)
  for bar in page.locator("progress").all():
    expect(bar).to_have_js_property("value", 1, timeout=DONE)


def painted(page, lane=0):
  """Number of different colours on the canvas of a lane."""
  return page.evaluate("""(lane) => {
    const canvas = document.querySelectorAll("#lanes canvas")[lane];
    const data = canvas.getContext("2d").getImageData(
        0, 0, canvas.width, canvas.height).data;
    const seen = new Set();
    for (let i = 0; i < data.length; i += 4) {
      seen.add((data[i] << 16) + (data[i + 1] << 8) + data[i + 2]);
    }
    return seen.size;
  }""", lane)


def draw_with_mouse(page, out):
  """A race: live, then its replay, the commit order, the gallery."""
  page.get_by_role("button", name="red heart").click()
  page.get_by_role("button", name="Generate", exact=True).click()
  expect(page.locator(".lane").first.locator(".passes")).not_to_have_text(
      "0", timeout=DONE)
  page.screenshot(path=out / "live.png")
  wait_until_done(page)
  assert painted(page, 0) > 8 and painted(page, 1) > 8
  page.screenshot(path=out / "done.png", full_page=True)
  page.get_by_role("button", name="Replay").click()
  page.wait_for_timeout(700)
  page.screenshot(path=out / "replay.png")
  page.wait_for_timeout(9000)
  page.get_by_role("button", name="Commit order").click()
  page.screenshot(path=out / "order.png")
  expect(page.locator("#gallery button")).to_have_count(1)
  print("race:", page.locator("#verdict").inner_text())


def mistakes_are_told(page, out):
  """A wrong setting is one line beside the form, and nothing is generated."""
  page.locator("#settings").fill("lookahead=many")
  page.get_by_role("button", name="Generate", exact=True).click()
  expect(page.locator("#error")).to_contain_text("lookahead=many")
  page.screenshot(path=out / "error.png")
  print("mistake:", page.locator("#error").inner_text())
  page.locator("#settings").fill("")


def empty_fields_are_the_models_own(page):
  """No seed, guidance or number; Enter while it generates starts nothing."""
  for name in ("seed", "guidance", "images"):
    page.locator(f"#{name}").fill("")
  page.locator("#prompt").fill("turned \u202e around")
  page.evaluate("""() => {
    const enter = { key: "Enter", bubbles: true, cancelable: true };
    for (let i = 0; i < 3; i++) {
      document.getElementById("prompt").dispatchEvent(
          new KeyboardEvent("keydown", enter));
    }
  }""")
  wait_until_done(page)
  expect(page.locator("#gallery button")).to_have_count(2)
  expect(page.locator("#again")).to_contain_text("guidance=None")
  expect(page.locator("#again")).to_contain_text(r"turned \u202e around")
  print("empty fields:", page.locator("#again").inner_text())


def hostile_prompts_stay_text(page, address):
  """Markup in a prompt is shown as it was typed and runs nowhere."""
  page.locator("#prompt").fill(HOSTILE)
  page.locator("#race").uncheck()
  page.get_by_role("button", name="Generate", exact=True).click()
  wait_until_done(page)
  expect(page.locator("#gallery b").first).to_have_text(HOSTILE)
  assert page.evaluate("window.owned") is None
  assert page.locator("#gallery script").count() == 0
  for path in ("/../setup.cfg", "/v1/images/files/../../etc/passwd",
               "/v1/images/files/x.png", "/%2e%2e/%2e%2e/etc/passwd"):
    assert page.request.get(address + path).status == 404, path
  print("hostile prompt: shown as text; paths out of the page: 404")


def draw_with_keyboard(page, out):
  """From the address bar to an image and its replay without a mouse."""
  page.keyboard.press("Tab")
  expect(page.locator(".skip")).to_be_focused()
  page.keyboard.press("Tab")
  expect(page.locator("#prompt")).to_be_focused()
  page.keyboard.press("ControlOrMeta+a")
  page.keyboard.type("rainbow")
  page.keyboard.press("Enter")
  wait_until_done(page)
  for _ in range(30):
    page.keyboard.press("Tab")
    if page.evaluate("document.activeElement.id") == "order":
      break
  page.keyboard.press("Space")
  expect(page.locator("#order")).to_have_attribute("aria-pressed", "true")
  page.screenshot(path=out / "keyboard.png")
  page.keyboard.press("Tab")
  assert page.evaluate(
      "document.activeElement.closest('#gallery') !== null")
  page.keyboard.press("Enter")
  expect(page.locator("#status")).to_contain_text("Done")
  print("keyboard: generated, order shown, gallery opened")


def fits_a_phone(page, out):
  """Nothing is wider than the window, and what is tapped is large enough."""
  assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
  page.locator("#images").fill("2")
  page.get_by_role("button", name="Generate", exact=True).tap()
  wait_until_done(page)
  assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
  page.screenshot(path=out / "phone.png", full_page=True)
  box = page.get_by_role("button", name="Generate", exact=True).bounding_box()
  assert box["height"] >= 44, box
  print("phone: no sideways scrolling, draw button", box["height"], "px high")


def main():
  """Runs all checks."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--out", type=pathlib.Path, default="screenshots")
  parser.add_argument("--model", default="greys")
  parser.add_argument("--bench")
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  path = shutil.which("chromium") or shutil.which("google-chrome")
  with serve.page(args.model, args.bench) as (address, _), (
      sync_playwright()) as player:
    browser = player.chromium.launch(
        executable_path=path, args=["--no-sandbox"])
    errors = []

    def open_page(**settings):
      page = browser.new_context(**settings).new_page()
      page.on("pageerror", lambda error: errors.append(str(error)))
      page.goto(address)
      expect(page.locator("#name option").first).to_be_attached()
      return page

    page = open_page(viewport={"width": 1200, "height": 900})
    draw_with_mouse(page, args.out)
    mistakes_are_told(page, args.out)
    empty_fields_are_the_models_own(page)
    hostile_prompts_stay_text(page, address)
    page = open_page(viewport={"width": 1200, "height": 900},
                     reduced_motion="reduce", color_scheme="dark")
    draw_with_keyboard(page, args.out)
    page = open_page(viewport=PHONE, has_touch=True, is_mobile=True,
                     device_scale_factor=2)
    fits_a_phone(page, args.out)
    browser.close()
    assert not errors, errors
  print("all checks passed; screenshots are in", args.out)


if __name__ == "__main__":
  main()
