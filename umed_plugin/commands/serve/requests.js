// ---- Requests to the server.

const GONE = "The server does not respond. Check that umed serve is still running.";

async function send(method, path, body) {
  let reply;
  try { reply = await fetch(path, {method, body}); } catch { throw new Error(GONE); }
  const content = await reply.json().catch(() => ({error: GONE}));
  if (!reply.ok) throw new Error(content.error || GONE);
  return content;
}

function sendFile(path, file, onProgress) {  // XMLHttpRequest, because fetch reports no upload progress
  return new Promise((done, failed) => {
    const request = new XMLHttpRequest();
    request.open("PUT", path + "?name=" + encodeURIComponent(file.name));
    request.upload.onprogress = event => onProgress(event.loaded);
    request.onerror = () => failed(new Error(GONE));
    request.onload = () => {
      if (request.status === 200) return done();
      let message = GONE;
      try { message = JSON.parse(request.responseText).error; } catch { /* not a response of our server */ }
      failed(new Error(message));
    };
    request.send(file);
  });
}

// Reads lines of JSON, one object each, and returns the value of the first one with the key `wanted`.
async function follow(path, body, wanted, signal, onLine) {
  let reply;
  try { reply = await fetch(path, {method: "POST", body: JSON.stringify(body), signal}); }
  catch (error) { throw error.name === "AbortError" ? error : new Error(GONE); }
  if (!reply.ok) throw new Error((await reply.json().catch(() => ({}))).error || GONE);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) throw new Error("The connection to the server was lost. Ask again.");
    const lines = (held + value).split("\n");
    held = lines.pop();
    for (const line of lines) {
      const message = JSON.parse(line);
      if (message.error) throw new Error(message.error);
      if (wanted in message) return message[wanted];
      onLine(message);
    }
  }
}
