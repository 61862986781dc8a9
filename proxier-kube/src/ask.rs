//! Requests to the API server.

use std::{io, pin::Pin};

use futures_util::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, TryStreamExt};
use http::{HeaderValue, Request, header};
use http_body_util::BodyExt;
use kube::{Client, client::Body};

use crate::trouble::{Asked, Trouble, TroubleKind};

/// The most that is read of a refusal.
const MAX_REFUSAL_BYTES: u64 = 64 << 10;

/// The body of an answer, as it comes in.
pub(crate) struct Answer {
    asked: Asked,
    body: Pin<Box<dyn AsyncBufRead + Send>>,
}

/// Asks, and waits for the head of the answer. A refusal is an error.
pub(crate) async fn send(
    client: &Client,
    asked: Asked,
    request: Result<Request<Vec<u8>>, kube::core::request::Error>,
) -> Result<Answer, Trouble> {
    let mut request = request
        .map_err(|error| asked.trouble(TroubleKind::Refused, format!("not asked: {error}")))?;
    // Events must not wait in a compressor until a block is full.
    request.headers_mut().insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    let response =
        client.send(request.map(Body::from)).await.map_err(|error| asked.client(&error))?;
    let (head, body) = response.into_parts();
    let body = Box::pin(body.into_data_stream().map_err(io::Error::other).into_async_read());
    let mut answer = Answer { asked, body };
    if head.status.is_success() {
        return Ok(answer);
    }
    let mut refusal = Vec::new();
    // Half a refusal says more than none.
    (&mut answer.body).take(MAX_REFUSAL_BYTES).read_to_end(&mut refusal).await.ok();
    let retry_after = head.headers.get(header::RETRY_AFTER);
    let retry_after = retry_after.and_then(|it| it.to_str().ok()?.parse().ok());
    Err(asked.status(head.status, &String::from_utf8_lossy(&refusal), retry_after))
}

impl Answer {
    /// The whole body.
    pub(crate) async fn text(mut self) -> Result<String, Trouble> {
        let mut bytes = Vec::new();
        let read = self.body.read_to_end(&mut bytes).await;
        read.map_err(|error| self.asked.broken(&error))?;
        String::from_utf8(bytes).map_err(|error| {
            self.asked.trouble(TroubleKind::Garbled, format!("the answer is not text: {error}"))
        })
    }

    /// The next line; `None` at the end. A line without end is a broken connection's, and none.
    pub(crate) async fn line<'a>(
        &mut self,
        buffer: &'a mut Vec<u8>,
    ) -> Result<Option<&'a str>, Trouble> {
        buffer.clear();
        let read = self.body.read_until(b'\n', buffer).await;
        read.map_err(|error| self.asked.broken(&error))?;
        if buffer.last() != Some(&b'\n') {
            return Ok(None);
        }
        str::from_utf8(buffer).map(Some).map_err(|error| {
            self.asked.trouble(TroubleKind::Garbled, format!("an event is not text: {error}"))
        })
    }
}
