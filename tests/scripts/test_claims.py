"""docs/claims.md is up to date with the result files."""

from scripts.claims import PAGE, page


def test_the_page_matches_the_result_files():
    assert PAGE.read_text() == page(), "run: python scripts/claims.py"
