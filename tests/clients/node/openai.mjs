// openai-node: `node openai.mjs BASE MODEL`; a parrot says what stands between its two words.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [base, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: base, apiKey: "none", maxRetries: 0 });
const say = (text) => [{ role: "user", content: `!say ${text} !end` }];
const call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>';
const parameters = { type: "object", properties: { city: { type: "string" } } };
const tools = [{ type: "function", function: { name: "weather", parameters } }];
const paris = { city: "Paris" };

const whole = await client.chat.completions.create({ model, messages: say("Hello.") });
assert.equal(whole.choices[0].message.content, "Hello.");

let text = "";
const stream = await client.chat.completions.create({ model, messages: say("Hello."), stream: true });
for await (const chunk of stream) text += chunk.choices[0]?.delta.content ?? "";
assert.equal(text, "Hello.");

const called = await client.chat.completions.create({ model, messages: say(call), tools });
assert.deepEqual(JSON.parse(called.choices[0].message.tool_calls[0].function.arguments), paris);

const streamed = client.chat.completions.stream({ model, messages: say(call), tools });
const told = await streamed.finalMessage();
assert.deepEqual(JSON.parse(told.tool_calls[0].function.arguments), paris);

const format = zodResponseFormat(z.object({ city: z.string() }), "place");
const parsed = await client.chat.completions.parse({
  model,
  messages: say(JSON.stringify(paris)),
  response_format: format,
});
assert.deepEqual(parsed.choices[0].message.parsed, paris);

const first = await client.responses.create({ model, input: "!say Hello. !end" });
assert.equal(first.output_text, "Hello.");
const again = { model, input: "!say Bye. !end", previous_response_id: first.id };
assert.equal((await client.responses.create(again)).output_text, "Bye.");
assert.equal((await client.responses.retrieve(first.id)).output_text, "Hello.");
await client.responses.delete(first.id);
await assert.rejects(client.responses.retrieve(first.id), OpenAI.NotFoundError);

const vectors = await client.embeddings.create({ model, input: ["ONE", "ANOTHER"] });
assert.equal(vectors.data.length, 2);
assert.equal(vectors.data[1].embedding[1], 7);

const completion = { model, prompt: "abc", echo: true, logprobs: 1, max_tokens: 0 };
const scored = await client.completions.create(completion);
assert.equal(scored.choices[0].text, "abc");
assert.equal(scored.choices[0].logprobs.token_logprobs[0], null);

await assert.rejects(client.chat.completions.create({ model: "none", messages: say("a") }), (error) => {
  assert.ok(error instanceof OpenAI.NotFoundError);
  return error.code === "model_not_found";
});
console.log("ok");
