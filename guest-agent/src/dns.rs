use tokio::io::{AsyncRead, AsyncWrite};
pub(crate) async fn serve(_stream: impl AsyncRead + AsyncWrite) {}
