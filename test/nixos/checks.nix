# What makes a configuration fail although each value has its type: assertions of NixOS itself,
# and mistakes that NixOS lets through and a machine does not survive. Each is a rule and the
# mistakes against it, none where all is well.
{ config, lib, files, store }:

let
  inherit (builtins)
    attrNames
    attrValues
    concatMap
    elem
    elemAt
    filter
    head
    isString
    length
    map
    match
    split
    ;

  isUser = name: config.users.users ? ${name};
  isGroup = name: config.users.groups ? ${name};
  matches = pattern: text: match pattern text != null;

  # ── What there is to check ──
  services = config.systemd.services;
  perService = f: concatMap (name: f name services.${name}) (attrNames services);

  # Units of ours, and of systemd and NixOS.
  units = map (name: "${name}.service") (attrNames services) ++ [
    "dbus.service"
    "local-fs.target"
    "multi-user.target"
    "network-online.target"
    "network.target"
    "sysinit-reactivation.target"
  ];

  # The words of all commands of a service, flags and their values apart, and of the files in
  # /etc/kubernetes that they name.
  wordsOf =
    service:
    let
      commands = filter (matches "Exec.*") (attrNames service.serviceConfig);
    in
    concatMap (word: [ word ] ++ words (files.${word}.text or "")) (
      words (toString (map (name: service.serviceConfig.${name}) commands))
    );
  words = text: filter (word: isString word && word != "") (split "[][[:space:]\\\"={},:]+" text);
  perWord = wrong: describe: perService (name: service: map (describe name) (filter wrong (wordsOf service)));

  # tmpfiles rules: type, path, mode, user, group, age, argument
  rules = map (rule: filter (field: isString field && field != "") (split " +" rule)) config.systemd.tmpfiles.rules;
  field = index: rule: if length rule > index then elemAt rule index else "-";
  pathOf = field 1;
  modeOf = field 2;
  userOf = field 3;
  groupOf = field 4;
  perRule = wrong: describe: map (rule: "${describe}: ${toString rule}") (filter wrong rules);

  # ── What is wrong ──
  # In the store, but neither a program of a package nor a file that the evaluation writes.
  notInStore =
    word:
    let
      parts = match "(/nix/store/[^/]+)/bin/([^/]+)" word;
      program = parts != null && elem (elemAt parts 1) (store.${head parts}.bin or [ ]);
    in
    matches "/nix/store/.*" word && !program && !(files ? ${word});
  # Where other systems keep programs and libraries, and NixOS has nothing unless a rule makes it.
  elsewhere =
    word:
    matches "(/usr|/bin|/sbin|/lib|/lib64|/opt)(/.*)?" word
    && !(elem word ([ "/bin/sh" "/usr/bin/env" ] ++ map pathOf rules));
  unwritten = word: matches "/etc/kubernetes/.+" word && !(files ? ${word});
  notHandedOver = word: matches "/var/lib/kubernetes/.+" word && !(elem word (map pathOf rules));
  isSecret = matches ".*(-key\\.pem|\\.kubeconfig|/encryption-config\\.yaml|_key)";

  rule = name: mistakes: { inherit name mistakes; };
  holds = name: condition: rule name (lib.optional (!condition) name);
in
map (assertion: holds assertion.message assertion.assertion) config.assertions
++ [
  (holds "root can log in by key" (config.users.users.root.openssh.authorizedKeys.keys != [ ]))
  (rule "nobody has a password" (
    map (user: "${user} has a password") (
      filter (name: !(elem config.users.users.${name}.hashedPassword [ null "!" ])) (attrNames config.users.users)
    )
  ))
  (rule "each user is a system user with a group that exists" (
    map (name: "users.users.${name} is no system user, or its group does not exist") (
      filter (
        name:
        let
          user = config.users.users.${name};
        in
        !(isGroup user.group && (name == "root" || user.isSystemUser))
      ) (attrNames config.users.users)
    )
  ))
  (holds "there is a root file system, and an ESP for systemd-boot" (
    config.fileSystems ? "/" && (config.fileSystems ? "/boot" || !config.boot.loader.systemd-boot.enable)
  ))
  (rule "each service runs as a user and group that exist" (
    perService (
      name: service:
      lib.optional (!isUser (service.serviceConfig.User or "root") || !isGroup (service.serviceConfig.Group or "root"))
        "${name}.service runs as ${service.serviceConfig.User or "root"}:${service.serviceConfig.Group or "root"}, which does not exist"
    )
  ))
  (rule "each service has something to run" (
    perService (name: service: lib.optional (!(service.serviceConfig ? ExecStart)) "${name}.service has no ExecStart")
  ))
  (rule "each unit that a service names exists" (
    perService (
      name: service:
      map (unit: "${name}.service names ${unit}, which does not exist") (
        filter (unit: !(elem unit units)) (
          service.after ++ service.before ++ service.wants ++ service.requires ++ service.wantedBy ++ service.requiredBy
        )
      )
    )
  ))
  (rule "each program in a command is one of its package" (
    perWord notInStore (name: word: "${name}.service names ${word}, which no package has")
    ++ concatMap (
      rule: map (word: "a tmpfiles rule names ${word}, which no package has") (filter notInStore rule)
    ) rules
  ))
  (rule "no command names a place that NixOS does not have" (
    perWord elsewhere (name: word: "${name}.service names ${word}, a place that NixOS does not have")
  ))
  (rule "each file in /etc that a command names is written" (
    perWord unwritten (name: word: "${name}.service names ${word}, which no environment.etc writes")
  ))
  (rule "each key and kubeconfig that a command names is handed to its user" (
    perWord notHandedOver (name: word: "${name}.service names ${word}, which no tmpfiles rule hands over")
  ))
  (rule "the users and groups of tmpfiles rules exist" (
    perRule (rule: userOf rule != "-" && !isUser (userOf rule)) "a tmpfiles rule's user does not exist"
    ++ perRule (rule: groupOf rule != "-" && !isGroup (groupOf rule)) "a tmpfiles rule's group does not exist"
  ))
  (rule "no secret can be read by everybody" (
    perRule (rule: isSecret (pathOf rule) && !(elem (modeOf rule) [ "0600" "0640" ])) "a secret that others can read"
  ))
]
