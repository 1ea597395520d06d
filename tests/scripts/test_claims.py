"""The page of claims says what the result files say."""

from scripts.claims import PAGE, claims


def test_the_page_is_made_of_the_result_files():
    assert PAGE.read_text() == claims(), "run: python scripts/claims.py"
