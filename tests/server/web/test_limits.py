import http.client
from urllib.parse import urlsplit

from optwatch_server.web.limits import MAX_BODY_BYTES


def test_a_body_at_the_limit_is_read_and_one_byte_more_is_refused(small) -> None:
    headers = {"Content-Type": "application/json"}
    body = b'{"schema": 1, "id": "run-1"}'
    padded = body + b" " * (MAX_BODY_BYTES - len(body))
    assert small.client.post("/api/v1/runs", content=padded, headers=headers).status_code == 201
    answer = small.client.post("/api/v1/runs", content=padded + b" ", headers=headers)
    assert answer.status_code == 413
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["detail"] == "the body has 1048577 bytes, and 1048576 is the limit: send smaller batches"


def test_a_body_that_does_not_tell_its_length_is_cut_at_the_limit(small) -> None:
    pieces = (b" " * 65536 for _ in range(17))
    answer = small.client.post("/api/v1/runs", content=pieces, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert "more than 1048576 bytes" in answer.json()["detail"]


def test_an_encoded_body_is_refused_with_the_encoding_named(small) -> None:
    answer = small.client.post("/api/v1/runs", content=b"x", headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 415
    assert answer.json()["detail"] == "the content encoding 'gzip' is not supported: send the body as it is"


def test_a_client_that_goes_away_in_the_middle_harms_no_one(small) -> None:
    connection = http.client.HTTPConnection(urlsplit(small.url).netloc, timeout=10)
    connection.putrequest("POST", "/api/v1/runs")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"half")
    connection.close()
    assert small.run().status_code == 201
