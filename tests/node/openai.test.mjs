// OpenAI's client for Node against a server whose answers were planted; tests/end_to_end/test_server_node.py runs it.
import assert from "node:assert/strict";
import test from "node:test";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.EDGEPHI_URL}/v1`, apiKey: "none", maxRetries: 0, timeout: 60_000 });
const model = "tiny";
const messages = [{ role: "user", content: "How are you?" }];
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const tools = [{ type: "function", function: { name: "get_weather", description: "How warm it is.", parameters } }];

async function whole(stream) {
  let text = "";
  for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
  return text;
}

test("an answer, with its usage", async () => {
  const done = await client.chat.completions.create({ model, messages });
  assert.equal(done.choices[0].message.content, "Fine, thank you.");
  assert.equal(done.choices[0].finish_reason, "stop");
  assert.equal(done.usage.total_tokens, done.usage.prompt_tokens + done.usage.completion_tokens);
});

test("a stream", async () => {
  const stream = await client.chat.completions.create({ model, messages, stream: true });
  assert.equal(await whole(stream), "One, two, three.");
});

test("a tool is called in a stream, and its result is answered", async () => {
  const stream = client.chat.completions.stream({ model, messages, tools });
  const { message, finish_reason } = (await stream.finalChatCompletion()).choices[0];
  assert.equal(finish_reason, "tool_calls");
  const [call] = message.tool_calls;
  assert.equal(call.function.name, "get_weather");
  assert.deepEqual(JSON.parse(call.function.arguments), { city: "Oslo" });
  const result = { role: "tool", tool_call_id: call.id, content: "21" };
  const done = await client.chat.completions.create({ model, messages: [...messages, message, result], tools });
  assert.equal(done.choices[0].message.content, "It is 21 degrees.");
});

test("JSON of a schema", async () => {
  const schema = { type: "object", properties: { age: { type: "integer" } }, required: ["age"] };
  const response_format = { type: "json_schema", json_schema: { name: "person", schema, strict: true } };
  const done = await client.chat.completions.create({ model, messages, response_format });
  assert.deepEqual(JSON.parse(done.choices[0].message.content), { age: 36 });
});

test("responses remember", async () => {
  const first = await client.responses.create({ model, input: "Your name?" });
  assert.equal(first.output_text, "My name is Ada.");
  const events = [];
  for await (const event of await client.responses.create({
    model,
    input: "Again?",
    previous_response_id: first.id,
    stream: true,
  })) {
    events.push(event);
  }
  assert.equal(events.at(-1).response.output_text ?? events.at(-1).response.output[0].content[0].text, "Ada, as I said.");
  await client.responses.delete(first.id);
  await assert.rejects(client.responses.retrieve(first.id), OpenAI.NotFoundError);
});

test("errors name the parameter", async () => {
  await assert.rejects(client.chat.completions.create({ model: "other", messages }), OpenAI.NotFoundError);
  await assert.rejects(client.chat.completions.create({ model, messages, n: 2 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "n");
    return true;
  });
});

test("an aborted request ends its answer", async () => {
  const controller = new AbortController();
  const options = { model, messages, max_tokens: 3000, temperature: 2, seed: 1, logit_bias: { 2: -100 }, stream: true };
  const stream = await client.chat.completions.create(options, { signal: controller.signal });
  for await (const _ of stream) {
    controller.abort();
    break;
  }
  const deadline = Date.now() + 10_000;
  for (;;) {
    const { running } = await (await fetch(`${process.env.EDGEPHI_URL}/health`)).json();
    if (running === 0) break;
    assert.ok(Date.now() < deadline, "the answer goes on");
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
});
