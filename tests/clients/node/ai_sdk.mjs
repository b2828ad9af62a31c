// Vercel's AI SDK: `node ai_sdk.mjs BASE MODEL`, over chat completions and over the Responses API.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [base, name] = process.argv.slice(2);
const compatible = createOpenAICompatible({
  name: "precast",
  baseURL: base,
  apiKey: "none",
  supportsStructuredOutputs: true,
  includeUsage: true,
});
const openai = createOpenAI({ baseURL: base, apiKey: "none" });
const say = (text) => `!say ${text} !end`;
const call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>';

for (const model of [compatible(name), openai.responses(name)]) {
  const whole = await generateText({ model, prompt: say("Hello."), maxRetries: 0 });
  assert.equal(whole.text, "Hello.");
  assert.equal(whole.finishReason, "stop");
  assert.ok(whole.usage.inputTokens > 0);

  let text = "";
  for await (const part of streamText({ model, prompt: say("Hello."), maxRetries: 0 }).textStream)
    text += part;
  assert.equal(text, "Hello.");

  const asked = [];
  const weather = tool({
    description: "Tells the weather.",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => {
      asked.push(city);
      return say("It is sunny.");
    },
  });
  const agent = { model, prompt: say(call), tools: { weather }, maxRetries: 0 };
  const answer = await generateText({ ...agent, stopWhen: stepCountIs(2) });
  assert.equal(answer.text, "It is sunny.");
  const streamed = streamText({ ...agent, stopWhen: stepCountIs(2) });
  assert.equal(await streamed.text, "It is sunny.");
  assert.deepEqual(asked, ["Paris", "Paris"]);

  const place = await generateText({
    model,
    prompt: say('{"city": "Paris"}'),
    output: Output.object({ schema: z.object({ city: z.string() }) }),
    maxRetries: 0,
  });
  assert.deepEqual(place.output, { city: "Paris" });
}

const { embeddings } = await embedMany({
  model: compatible.embeddingModel(name),
  values: ["ONE", "ANOTHER"],
  maxRetries: 0,
});
assert.deepEqual(embeddings.map((vector) => vector[1]), [3, 7]);
console.log("ok");
