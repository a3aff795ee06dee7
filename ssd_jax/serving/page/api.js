// What the page asks the server: its description, and images as events.

let key = "";

// Sets the key that the server asks for.
export function setKey(text) { key = text; }

async function ask(url, values) {
  const options = values && {
    method: "POST", body: JSON.stringify(values),
    headers: { "Content-Type": "application/json",
               ...(key && { Authorization: "Bearer " + key }) },
  };
  const answer = await fetch(url, options).catch(() => {
    throw new Error("No answer: is the server still running?");
  });
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => ({}));
  const error = new Error(body.error ? body.error.message : "No answer.");
  error.status = answer.status;
  throw error;
}

// The model, its decoders and limits.
export async function info() { return (await ask("/info")).json(); }

// Draws images; calls `accepted` once, then `listen` with each event of the API.
export async function draw(values, accepted, listen) {
  const answer = await ask("/v1/images/generations", {
    ...values, stream: true, partial_images: 3, progress: true });
  accepted();
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const line = part.split("\n").find((x) => x.startsWith("data: "));
      if (!line) continue;  // a sign of life
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      listen(event);
    }
  }
}
