// Drives a gateway by the official SDKs of JavaScript, and prints what they made of it, one JSON object.
import OpenAI from "openai";
import Anthropic from "@anthropic-ai/sdk";

const { URL: url, API_KEY: apiKey, POOR_KEY: poorKey } = process.env;
const client = (key, more = {}) => new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0, ...more });
const openai = client(apiKey);
const anthropic = new Anthropic({ baseURL: url, apiKey, maxRetries: 0 });
const model = "gpt-4o-mini";
const messages = [{ role: "user", content: "Hello!" }];
const parameters = { type: "object", properties: { a: { type: "integer" } } };
const tools = [{ type: "function", function: { name: "add", parameters } }];

async function failing(call) {
  try {
    await call();
  } catch (error) {
    const { status, code, type, param } = error;
    return { kind: error.constructor.name, status, code, type, param, retryAfter: error.headers?.get("retry-after") };
  }
  return null;
}

const told = {};
const chat = await openai.chat.completions.create({ model, messages });
told.chat = { text: chat.choices[0].message.content, cost: chat.usage.total_cost_usd };

const pieces = [];
const asked = { model, messages, stream: true, stream_options: { include_usage: true } };
for await (const piece of await openai.chat.completions.create(asked)) pieces.push(piece);
told.stream = {
  role: pieces[0].choices[0].delta.role,
  text: pieces.map((piece) => piece.choices[0]?.delta?.content ?? "").join(""),
  cost: pieces.at(-1).usage.total_cost_usd,
};

const called = await openai.chat.completions.create({ model, messages, tools });
told.tool = { name: called.choices[0].message.tool_calls[0].function.name, cost: called.usage.total_cost_usd };

const response = await openai.responses.create({ model, input: "Hello" });
told.response = { text: response.output_text, cost: response.usage.total_cost_usd };

const vectors = await openai.embeddings.create({ model: "text-embedding-3-small", input: ["a", "b"] });
told.embeddings = { count: vectors.data.length, isNumber: typeof vectors.data[0].embedding[0] === "number", cost: vectors.usage.total_cost_usd };

const image = await openai.images.generate({ model: "gpt-image-1", prompt: "A sea", quality: "low", size: "1024x1024" });
told.image = { hasUrl: image.data[0].url.includes("/v1/media/"), cost: image.cost };

const claude = { model: "claude-sonnet-4-6", max_tokens: 50, messages };
const message = await anthropic.messages.create(claude);
told.message = { text: message.content[0].text, cost: message.usage.total_cost_usd };

const events = [];
for await (const event of await anthropic.messages.create({ ...claude, stream: true })) events.push(event);
const delta = events.find((event) => event.type === "message_delta");
told.messageStream = { last: events.at(-1).type, cost: delta.usage.total_cost_usd };

told.errors = {
  stranger: await failing(() => client("sk-nobody").chat.completions.create({ model, messages })),
  poor: await failing(() => client(poorKey).chat.completions.create({ model, messages })),
  unknown: await failing(() => openai.chat.completions.create({ model: "no-such-model", messages })),
  field: await failing(() => openai.chat.completions.create({ model, messages, n: 0 })),
  busy: await failing(() =>
    openai.chat.completions.create({ model, messages: [{ role: "user", content: "[sandbox: status=429, retry_after=7]" }] }),
  ),
  anthropic: await failing(() => new Anthropic({ baseURL: url, apiKey: "sk-nobody", maxRetries: 0 }).messages.create(claude)),
};
console.log(JSON.stringify(told));
