"""What verify and doctor found is one sentence, and what failed is named in it."""

from reasonscope.probes.checks.doctor import EnvironmentCheck, Examination, ShippedModel, _Device, _Package
from reasonscope.probes.checks.summaries import doctor_summary, verification_summary
from reasonscope.probes.checks.verification import Check

GOOD = Check(name="batch", passed=True, detail="left-padded == one by one", value=1e-7, limit=1e-4)


def test_failed_checks_are_named_and_nothing_is_recommended_after_them():
    bad = Check(name="cache", passed=False, detail="SiteError: no such site")
    passed, failed = verification_summary("mine", [GOOD]), verification_summary("mine", [GOOD, bad])
    assert passed.finding.startswith("mine: all 1 checks passed") and "record --model mine" in passed.next_command
    assert failed.finding.startswith("mine: 1 of 2 checks failed (cache)") and not failed.next_command
    assert failed.rows == [
        ("batch", "yes", "1e-07", "0.0001", "left-padded == one by one"),
        ("cache", "NO", "", "", "SiteError: no such site"),
    ]


def examination(*, torch, streamlit):
    def part(name, package, remedy):
        fits = package is not None and package >= "2"
        one = _Package(name=name, installed=package, needed=">=2", satisfied=fits)
        return EnvironmentCheck(name=name, packages=(one,), remedy=None if fits else remedy)

    return Examination(
        version="0.1.0",
        python="3.11.0",
        platform="here",
        core=part("torch", torch, "pip install reasonscope"),
        devices=(_Device(name="cpu", description="2 cores", memory=8.0),),
        extras=(part("streamlit", streamlit, "pip install 'reasonscope[app]'"),),
        models=(ShippedModel(name="organism", path="/there", remedy=None),),
    )


def test_a_missing_extra_is_named_and_leaves_the_installation_complete():
    found = doctor_summary(examination(torch="2.1", streamlit=None))
    assert found.finding == "reasonscope 0.1.0 is complete here; not installed: streamlit."
    assert ("extra streamlit", "streamlit missing") in found.rows
    assert "For streamlit: pip install 'reasonscope[app]'" in found.notes
    assert ("device cpu", "2 cores, 8.0 GiB") in found.rows


def test_an_old_package_of_the_core_is_named_with_what_is_needed():
    found = doctor_summary(examination(torch="1.0", streamlit="2.0"))
    assert "cannot work here" in found.finding and not found.next_command
    assert ("core", "torch 1.0 (needs >=2)") in found.rows
    assert "For torch: pip install reasonscope" in found.notes
