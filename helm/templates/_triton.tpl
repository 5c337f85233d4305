{{/* Triton, in pods of its own or in the server's. */}}

{{/* Compares the weights with their digests. */}}
{{- define "sd-service.triton.verifyContainer" -}}
{{- if .Values.engines.verify -}}
- name: verify-engines
  image: {{ include "sd-service.triton.image" . | quote }}
  imagePullPolicy: {{ .Values.images.pullPolicy | quote }}
  command: [sdserver, engine, verify]
  env:
    - {name: SDSERVER_MODEL_REPOSITORY, value: /models}
  resources: {requests: {cpu: 100m, memory: 256Mi}, limits: {memory: 512Mi}}
  securityContext: {{- include "sd-service.securityContext" . | nindent 4 }}
  {{- with include "sd-service.models.mount" (dict "root" . "readOnly" true) }}
  volumeMounts: {{- . | nindent 4 }}
  {{- end }}
{{- end -}}
{{- end -}}

{{/* The container, without the dash of a list. */}}
{{- define "sd-service.triton.container" -}}
{{- $triton := .Values.triton -}}
{{- $sidecar := include "sd-service.triton.sidecar" . -}}
name: triton
image: {{ include "sd-service.triton.image" . | quote }}
imagePullPolicy: {{ .Values.images.pullPolicy | quote }}
command: [sdserver, triton]
env:
  - {name: SDSERVER_MODEL_REPOSITORY, value: /models}
  {{- if $sidecar }}
  # The server is on the same loopback: nobody else reaches Triton.
  - {name: SDSERVER_TRITON_METRICS_HOST, value: 0.0.0.0}
  {{- else }}
  - {name: SDSERVER_TRITON_HOST, value: 0.0.0.0}
  {{- end }}
  - {name: SDSERVER_TRITON_GRPC_PORT, value: "8001"}
  - {name: SDSERVER_TRITON_HTTP_PORT, value: "8000"}
  - {name: SDSERVER_TRITON_METRICS_PORT, value: "8002"}
  - {name: SDSERVER_TRITON_START_SECONDS, value: {{ $triton.startSeconds | quote }}}
  {{- if not $sidecar }}
  # So that servers find new pods.
  - {name: SDSERVER_TRITON_MAX_CONNECTION_AGE_SECONDS, value: "60"}
  {{- end }}
  {{- with .Values.safety.model }}
  - {name: SDSERVER_SAFETY_MODEL, value: {{ . | quote }}}
  {{- end }}
  - {name: SDSERVER_LOG_LEVEL, value: {{ $triton.logLevel }}}
  - {name: SDSERVER_LOG_FORMAT, value: json}
  # Libraries keep things below it; the root file system is read-only.
  - {name: HOME, value: /tmp}
  {{- with $triton.env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
ports:
  {{- if not $sidecar }}
  - {name: triton-http, containerPort: 8000}
  - {name: triton-grpc, containerPort: 8001}
  {{- end }}
  - {name: triton-metrics, containerPort: 8002}
{{- $ask := "python /opt/sd-service/healthcheck.py triton" | splitList " " }}
startupProbe:
  {{- if $sidecar }}
  exec: {command: {{ $ask | toJson }}}
  timeoutSeconds: 5
  {{- else }}
  httpGet: {path: /v2/health/ready, port: triton-http}
  {{- end }}
  periodSeconds: 5
  failureThreshold: {{ add (div $triton.startSeconds 5) 6 }}
# Triton's gRPC health says whether it is ready, whatever it is asked: of no use for liveness.
livenessProbe:
  {{- if $sidecar }}
  exec: {command: {{ append $ask "live" | toJson }}}
  {{- else }}
  httpGet: {path: /v2/health/live, port: triton-http}
  {{- end }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  {{- if $sidecar }}
  exec: {command: {{ $ask | toJson }}}
  periodSeconds: 10
  {{- else }}
  grpc: {port: 8001}
  periodSeconds: 5
  {{- end }}
  timeoutSeconds: 5
  failureThreshold: 2
resources: {{- include "sd-service.triton.resources" . | nindent 2 }}
securityContext: {{- include "sd-service.securityContext" . | nindent 2 }}
volumeMounts:
  - {name: triton-shm, mountPath: /dev/shm}
  - {name: triton-tmp, mountPath: /tmp}
  {{- $readOnly := not (and (eq .Values.engines.source "claim") .Values.engines.claim.keepConversions) }}
  {{- with include "sd-service.models.mount" (dict "root" . "readOnly" $readOnly) }}
  {{- . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "sd-service.triton.resources" -}}
{{- $resources := deepCopy .Values.triton.resources -}}
{{- if eq .Values.triton.device "gpu" -}}
{{- $gpu := dict .Values.triton.gpu.resource (.Values.triton.gpu.count | toString) -}}
{{- range $kind := list "requests" "limits" -}}
{{- $_ := set $resources $kind (merge (dict) $gpu (index $resources $kind | default dict)) -}}
{{- end -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "sd-service.triton.volumes" -}}
- name: triton-shm
  emptyDir: {medium: Memory, sizeLimit: {{ .Values.triton.sharedMemory | quote }}}
- name: triton-tmp
  emptyDir: {sizeLimit: 8Gi}
{{- end -}}
