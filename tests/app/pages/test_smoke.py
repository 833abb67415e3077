"""The app opens in a real browser: the shortest way through it. What takes longer is in test_chromium.py, which is slow."""


def test_a_trace_of_the_example_is_read(page):
    page.goto("/trace")
    page.wait_for_selector(".card[data-index] .t")
    page.keyboard.press("j")
    page.wait_for_selector('.card[aria-current][data-index="0"]')
    page.wait_for_url("**sentence=0**")
