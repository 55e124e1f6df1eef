import re

import pytest

from optwatch_server.settings import Settings
from optwatch_server.shipping.configuration import GRAFANA, SERVER


def test_without_an_environment_nothing_is_paged_directly_and_links_are_those_of_the_rules() -> None:
    assert Settings.read({}) == Settings((), SERVER, GRAFANA, None)


def test_the_environment_is_read_and_a_flag_goes_before_it() -> None:
    environment = {
        "OPTWATCH_ALERTMANAGER_URL": "http://a:9093/, https://b/am ,",
        "OPTWATCH_PUBLIC_URL": "https://watch.example.com/",
        "OPTWATCH_GRAFANA_URL": "https://grafana.example.com",
        "OPTWATCH_COST_PER_DEVICE_HOUR": "2.5",
        "OPTWATCH_RECORDINGS_URL": "s3://bucket/optwatch",
    }
    assert Settings.read(environment) == Settings(
        ("http://a:9093", "https://b/am"),
        "https://watch.example.com",
        "https://grafana.example.com",
        2.5,
        "s3://bucket/optwatch",
    )
    assert Settings.read(environment, alertmanager_url="http://c").alertmanagers == ("http://c",)
    assert Settings.read(environment, alertmanager_url="").alertmanagers == ()
    assert Settings.read(environment, public_url="http://d").public_url == "http://d"


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        (
            "OPTWATCH_ALERTMANAGER_URL",
            "alertmanager:9093",
            "--alertmanager-url or $OPTWATCH_ALERTMANAGER_URL is 'alertmanager:9093' and is no http or https URL: "
            "give something like http://alertmanager:9093",
        ),
        ("OPTWATCH_ALERTMANAGER_URL", "http://am:99999", "cannot be read"),
        ("OPTWATCH_PUBLIC_URL", "ftp://x", "--public-url or $OPTWATCH_PUBLIC_URL is 'ftp://x'"),
        ("OPTWATCH_COST_PER_DEVICE_HOUR", "much", "$OPTWATCH_COST_PER_DEVICE_HOUR is 'much': give the cost of one"),
        ("OPTWATCH_COST_PER_DEVICE_HOUR", "nan", "is 'nan'"),
        ("OPTWATCH_COST_PER_DEVICE_HOUR", "-1", "is '-1'"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named_with_its_value_and_the_fix(name: str, value: str, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        Settings.read({name: value})


def test_a_password_in_an_address_is_not_repeated() -> None:
    with pytest.raises(ValueError, match="is no http") as refused:
        Settings.read({"OPTWATCH_ALERTMANAGER_URL": "ftp://user:secret@am"})
    assert "secret" not in str(refused.value)
