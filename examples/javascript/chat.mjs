// OpenAI's client for Node against `edgephi serve`: an answer in pieces, and JSON of a schema.
//
// npm install openai
// edgephi serve phi-4-mini
// node chat.mjs http://127.0.0.1:8080 phi-4-mini
import OpenAI from "openai";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const messages = [{ role: "user", content: "What is the capital of Japan?" }];

const stream = await client.chat.completions.create({ model, messages, max_tokens: 30, stream: true });
for await (const chunk of stream) {
  process.stdout.write((chunk.choices[0]?.delta?.content ?? "").replaceAll("\n", " "));
}
process.stdout.write("\n");

const schema = {
  type: "object",
  properties: { name: { type: "string" }, country: { type: "string" } },
  required: ["name", "country"],
  additionalProperties: false,
};
const done = await client.chat.completions.create({
  model,
  messages,
  max_tokens: 60,
  response_format: { type: "json_schema", json_schema: { name: "city", schema } },
});
const city = JSON.parse(done.choices[0].message.content);
console.log(`${city.name}, ${city.country}`);
