// An object store client for the tests: one JSON command a line on standard input, one JSON answer a line.
// Run as `node client.mjs NODE_MODULES_PARENT NATS_URL`. Contents travel in files.

import { readFile, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { resolve } from "node:path";
import { createInterface } from "node:readline";

const [folder, url] = process.argv.slice(2);
const require = createRequire(resolve(folder, "package.json"));
const { connect } = require("@nats-io/transport-node");
const { Objm } = require("@nats-io/obj");

const connection = await connect({ servers: url, name: "js" });
const stores = new Objm(connection);

async function collect(result) {
  const parts = [];
  for await (const part of result.data) parts.push(part);
  const error = await result.error;
  if (error) throw error;
  return Buffer.concat(parts);
}

const commands = {
  async put({ bucket, name, path }) {
    const store = await stores.open(bucket);
    const data = await readFile(path);
    const info = await store.putBlob({ name }, data);
    return { size: info.size, digest: info.digest };
  },
  async get({ bucket, name, path }) {
    const store = await stores.open(bucket);
    const result = await store.get(name);
    if (result === null) return null;
    const data = await collect(result);
    await writeFile(path, data);
    return { size: result.info.size, digest: result.info.digest };
  },
  async delete({ bucket, name }) {
    const store = await stores.open(bucket);
    return { purged: (await store.delete(name)).purged };
  },
  async update({ bucket, name, description }) {
    const store = await stores.open(bucket);
    await store.update(name, { description });
    return true;
  },
  async rename({ bucket, old, new: name }) {
    const store = await stores.open(bucket);
    await store.update(old, { name });
    return true;
  },
  async link({ bucket, target, name }) {
    const store = await stores.open(bucket);
    await store.link(name, await store.info(target));
    return true;
  },
  async list({ bucket }) {
    const store = await stores.open(bucket);
    return (await store.list()).filter((info) => !info.deleted).map((info) => info.name);
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const request = JSON.parse(line);
  let answer;
  try {
    answer = { result: await commands[request.command](request) };
  } catch (error) {
    answer = { error: String(error?.stack ?? error) };
  }
  process.stdout.write(JSON.stringify(answer) + "\n");
}
await connection.close();
